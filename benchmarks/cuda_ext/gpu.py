"""Everything that is measured on one GPU: the challenge's networks, single layers beside their peers, a tail, ceilings.

    python -m benchmarks.cuda_ext.gpu [--only=networks,layers,tail,ceilings] [--networks=1024x120,...] [--mnist_dir=DIR]

networks   from device-resident uint8 features to device-resident categories; generated weights, MNIST where --mnist_dir
           is given, digits otherwise
layers     a chain of layers in which every feature stays active, seconds by layer, reading the input included; each
           kernel family, on challenge layers and on layers whose inputs are random; beside it one layer of the same
           data as a dense product, as BCOO and through cuSPARSE, from activations to activations
tail       100 layers with 2,000 active features, seconds by layer, launches included
ceilings   what the device's memory moves

Results go to --output after every measurement, and are added to what the same device and versions wrote there; a second
run may do what the first had no time for. `tables.py` makes tables of them.
"""

import argparse
import dataclasses
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import peers
from benchmarks.cuda_ext import tables
from benchmarks.random_layers import random_layer
from benchmarks.results_file import Results
from benchmarks.timing import Timing, measure
from spdnn_jax import SparseLayer, build_plan, infer, ops, planner
from spdnn_jax.command_line import report
from spdnn_jax.graph_challenge import inputs, networks, radixnet
from spdnn_jax.plan import Plan

NETWORKS = [f"{neurons}x{layers}" for neurons in networks.NEURONS for layers in networks.LAYERS]
SECTIONS = ("networks", "layers", "tail", "ceilings")
FAMILIES = [kernel for kernel in planner.KERNELS if kernel != "auto"]

_TAIL_NEURONS, _TAIL_LAYERS, _TAIL_FEATURES = 1024, 100, 2000
_DISTINCT = 4  # layers of a chain that differ; their kind counts, not their number
_DISTINCT_FEATURES = 1024  # rows of random input, which repeat
_COMPARED = 256  # features on which a peer's result is compared with ours
_COPIED_BYTES = 1 << 32
_MEMORY_SHARE = "0.8"  # of the device, for JAX; the rest is CuPy's

Measurement = tuple[str, str, str, Callable[[], dict[str, Any]]]
"""Section, name, contender, and what measures it."""


def main() -> int:
    """Measures, writes, prints tables."""
    settings = _parse()
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", _MEMORY_SHARE)  # read when the device is first used
    kept = {name: value for name, value in vars(settings).items() if name != "output"}
    results = Results(settings.output, kept)
    sections = {"networks": _networks, "layers": _layers, "tail": _tail, "ceilings": _ceilings}
    begin = time.perf_counter()
    for section in settings.only:
        for measurement in sections[section](settings):
            if time.perf_counter() - begin > settings.time_limit:
                print(f"--time_limit={settings.time_limit:g}: {' '.join(measurement[:3])} and the rest are left out")
                return 0
            _measure_one(measurement, results)
    print(tables.markdown(results.content))
    return 0


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def listed(choices: list[str] | tuple[str, ...]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            if unknown := [name for name in text.split(",") if name not in choices]:
                raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(choices)}")
            return text.split(",")

        return read

    def network(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            neurons, _, layers = name.partition("x")
            if not (neurons.isdigit() and layers.isdigit()):
                raise argparse.ArgumentTypeError(f"{name!r} is no network: write neurons x layers, such as 1024x120")
        return names

    widths = [str(neurons) for neurons in networks.NEURONS]
    compressions = ["none", "neurons", "full"] if _can_compress() else ["none"]
    parser.add_argument("--only", type=listed(SECTIONS), default=list(SECTIONS), help="sections, in this order")
    parser.add_argument("--networks", type=network, default=NETWORKS)
    parser.add_argument("--widths", type=lambda text: text.split(","), default=widths, help="neurons of the layers")
    parser.add_argument("--patterns", type=listed(list(_PATTERNS)), default=list(_PATTERNS))
    parser.add_argument("--compress", type=listed(compressions), default=["none"])
    parser.add_argument("--mnist_dir", help="folder of the MNIST files in IDX form")
    parser.add_argument("--features", type=int, default=networks.FEATURES)
    parser.add_argument("--chain", type=int, default=20, help="layers of a chain")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--time_limit", type=float, default=540.0, help="seconds after which nothing more is begun")
    parser.add_argument("--output", default="benchmarks/results/h100.json")
    return parser.parse_args()


def _measure_one(measurement: Measurement, results: Results) -> None:
    section, name, contender, run = measurement
    start = time.perf_counter()
    measured: dict[str, Any]
    try:
        measured = run()
    except Exception as error:  # whatever one contender dies of, the others are measured
        measured = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    results.add({"section": section, "name": name, "contender": contender, **measured})
    outcome = measured.get("error") or report.duration(measured["seconds"])
    took = time.perf_counter() - start
    print(f"{section} {name} {contender}: {outcome} ({took:.0f} s with preparing)", flush=True)


def _measure_plan(plan: Plan, y0: jax.Array, settings: argparse.Namespace, calls: int | None = None) -> Timing:
    compiled = jax.jit(ops.categories).lower(plan, y0).compile(compiler_options=ops.COMPILER_OPTIONS)
    return measure(lambda: compiled(plan, y0), jax.block_until_ready, repeats=settings.repeats, calls=calls)


# --- networks ---------------------------------------------------------------------------------------------------------


def _can_compress() -> bool:
    return "compress" in inspect.signature(build_plan).parameters


def _networks(settings: argparse.Namespace) -> Iterator[Measurement]:
    for name in settings.networks:
        for compress in settings.compress:
            yield "networks", name, compress, functools.partial(_measure_network, name, compress, settings)


def _measure_network(name: str, compress: str, settings: argparse.Namespace) -> dict[str, Any]:
    neurons, layers = map(int, name.split("x"))
    y0 = _network_input(neurons, settings.features, settings.mnist_dir)
    start = time.perf_counter()
    options: dict[str, Any] = {"compress": compress} if _can_compress() else {}
    plan = build_plan(radixnet.layers(neurons, layers), **options)
    plan_seconds = time.perf_counter() - start
    _, active = jax.block_until_ready(ops.categories_and_active(plan, y0))
    timing = _measure_plan(plan, y0, settings, calls=1)
    edges = np.full(layers, neurons * networks.EDGES_PER_NEURON)
    paper = networks.PAPER_SECONDS.get(name) if settings.features == networks.FEATURES else None
    return {
        **timing.as_record(),
        "features": settings.features,
        "inputs": "mnist" if settings.mnist_dir else "digits",
        "plan_seconds": plan_seconds,
        "plan": plan.summary().splitlines(),
        "categories": int(active[-1]),
        "nominal_edges_per_second": networks.nominal_edges(settings.features, edges) / timing.median,
        "active_edges_per_second": None
        if compress != "none"  # what is multiplied then, the original layers do not say
        else networks.active_edges(settings.features, edges, np.asarray(active)) / timing.median,
        "paper_seconds": paper,
        "speedup": paper and paper / timing.median,
    }


@functools.lru_cache(maxsize=1)
def _network_input(neurons: int, count: int, mnist_dir: str | None) -> jax.Array:
    """Features uint8 (count, neurons) on the device; the networks of one width share them."""
    made = inputs.mnist(mnist_dir, neurons, count) if mnist_dir else inputs.digits(neurons, count)
    return jax.device_put(made)


# --- layers -----------------------------------------------------------------------------------------------------------


def _challenge_layers(neurons: int) -> list[SparseLayer]:
    """Layers of a generated network, without a bias: nothing dies."""
    bias = np.zeros((), np.float32)
    return [dataclasses.replace(layer, bias=bias) for layer in radixnet.layers(neurons, _DISTINCT)]


def _random_layers(neurons: int) -> list[SparseLayer]:
    """Layers whose outputs draw 32 inputs each, with random weights."""
    generator = np.random.default_rng(neurons)
    rows = np.full(neurons, networks.EDGES_PER_NEURON)
    return [random_layer(generator, neurons, rows, bias=0.0) for _ in range(_DISTINCT)]


_PATTERNS = {"challenge": _challenge_layers, "random": _random_layers}


@functools.lru_cache(maxsize=1)
def _layers_of(pattern: str, neurons: int) -> list[SparseLayer]:
    return _PATTERNS[pattern](neurons)


def _layers(settings: argparse.Namespace) -> Iterator[Measurement]:
    _network_input.cache_clear()  # makes room on the device
    for neurons in map(int, settings.widths):
        for pattern in settings.patterns:
            name = f"{neurons} {pattern}"
            for family in FAMILIES:
                yield "layers", name, family, functools.partial(_measure_chain, pattern, neurons, family, settings)
            for peer in peers.PEERS:
                yield "layers", name, peer.name, functools.partial(_measure_peer, pattern, neurons, peer, settings)


def _random_input(neurons: int, count: int) -> jax.Array:
    """Random features of 0 and 1, uint8 (count, neurons) on the device; the rows repeat."""
    rows = jnp.asarray(inputs.random(neurons, min(count, _DISTINCT_FEATURES), density=0.5))
    return jnp.tile(rows, (-(-count // len(rows)), 1))[:count]


def _chain(layers: list[SparseLayer], length: int) -> list[SparseLayer]:
    return [layers[k % len(layers)] for k in range(length)]


def _measure_chain(pattern: str, neurons: int, family: str, settings: argparse.Namespace) -> dict[str, Any]:
    y0 = _random_input(neurons, settings.features)
    plan = build_plan(_chain(_layers_of(pattern, neurons), settings.chain), kernel=family)  # pyright: ignore[reportArgumentType]
    return _per_layer(plan, y0, settings)


def _per_layer(plan: Plan, y0: jax.Array, settings: argparse.Namespace) -> dict[str, Any]:
    """Times a plan in which every feature stays active; seconds by layer."""
    _, active = jax.block_until_ready(ops.categories_and_active(plan, y0))
    if int(active[-1]) != len(y0):
        raise ValueError(f"{len(y0) - int(active[-1])} features died: seconds by layer would mean nothing")
    timing = _measure_plan(plan, y0, settings)
    by_layer = Timing([seconds / plan.layers for seconds in timing.seconds], timing.calls)
    return {
        **by_layer.as_record(),
        "layers": plan.layers,
        "features": len(y0),
        "active_edges_per_second": len(y0) * plan.edges / plan.layers / by_layer.median,
        "planner_would_take": planner.schedule(plan.table).reason,
    }


def _measure_peer(pattern: str, neurons: int, peer: peers.Peer, settings: argparse.Namespace) -> dict[str, Any]:
    layer = _layers_of(pattern, neurons)[0]
    count = peer.features(layer, settings.features)
    y0 = _random_input(neurons, count)
    run = peer.prepare(layer, y0.astype(jnp.float32))
    result = run()
    peer.wait(result)
    ours = infer(build_plan([layer]), y0[:_COMPARED])
    error = peers.difference(peers.on_host(result[:_COMPARED]), np.asarray(ours))
    del result
    if error > peer.tolerance:
        raise ValueError(f"its result differs from ours by {error:.1e} of the largest activation")
    timing = measure(run, peer.wait, repeats=settings.repeats)
    return {
        **timing.as_record(),
        "layers": 1,
        "features": count,
        "active_edges_per_second": count * layer.edges / timing.median,
        "largest_difference": error,
    }


# --- tail and ceilings ------------------------------------------------------------------------------------------------


def _tail(settings: argparse.Namespace) -> Iterator[Measurement]:
    name = f"{_TAIL_LAYERS} layers of {_TAIL_NEURONS}, {_TAIL_FEATURES:,} features"
    for family in ("auto", *FAMILIES):
        yield "tail", name, family, functools.partial(_measure_tail, family, settings)


def _measure_tail(family: str, settings: argparse.Namespace) -> dict[str, Any]:
    layers = _chain(_challenge_layers(_TAIL_NEURONS), _TAIL_LAYERS)
    plan = build_plan(layers, kernel=family)  # pyright: ignore[reportArgumentType]
    return _per_layer(plan, _random_input(_TAIL_NEURONS, _TAIL_FEATURES), settings)


def _ceilings(settings: argparse.Namespace) -> Iterator[Measurement]:
    yield "ceilings", "memory", "copy", functools.partial(_measure_copy, settings)


def _measure_copy(settings: argparse.Namespace) -> dict[str, Any]:
    words = jnp.zeros(_COPIED_BYTES // 4 if jax.default_backend() == "gpu" else 1 << 20, jnp.uint32)
    add_one = jax.jit(lambda words: words + jnp.uint32(1))
    timing = measure(lambda: add_one(words), jax.block_until_ready, repeats=settings.repeats)
    return {**timing.as_record(), "bytes_per_second": 2 * words.nbytes / timing.median}


if __name__ == "__main__":
    sys.exit(main())
