"""Is `infer` the fastest way through one layer? Beside XLA's dense product, BCOO and, on a GPU, cuSPARSE.

    python -m benchmarks.choice [--neurons=1024,4096] [--density=0.01,0.5] [--features=1,60000] [--time_limit=150]

One layer of random edges (each with the same chance), ReLU with the cap of 32, from activations to activations, both
float32 on the device. Contenders:

kernels            `infer` on a plan without dense products
infer, PRECISION   `infer` on a plan of `build_plan(precision=PRECISION)`, which picks what it takes for the faster one;
                   where that is the kernels, the program is the same and not timed again
the rest           as in peers.py; on a CPU, dense float32 and BCOO

Every result is compared with that of the kernels. What takes more than --memory GiB, or is foreseen to take more than
--limit seconds, is left out, and the record says so. Each figure is written as it comes; a later run goes on with the
file, and replaces what it measures anew. `choice_map.py` draws the figures of a file.
"""

import argparse
import dataclasses
import functools
import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import choice_map, peers
from benchmarks.results_file import Results
from benchmarks.timing import measure
from spdnn_jax import Plan, SparseLayer, build_plan, costs, infer, ops

NEURONS = (512, 1024, 2048, 4096, 8192, 16384)
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5)
FEATURES = (1, 8, 64, 512, 4096, 60000)

_ON_A_CPU = ("dense float32", "JAX BCOO")
_DISTINCT_FEATURES = 1024  # rows of input, which repeat
_COMPARED = 64  # features whose results are compared
_CHUNK = 1 << 26  # weights that are drawn at a time

_jitted = functools.partial(jax.jit, compiler_options=ops.COMPILER_OPTIONS)


@dataclasses.dataclass(frozen=True)
class Contender:
    """What is timed: `prepare` takes the activations, and returns what starts the work; as `peers.Peer` else."""

    name: str
    prepare: Callable[[jax.Array], peers.Run]
    fits: Callable[[int], bool]
    wait: Callable[[Any], Any]
    tolerance: float
    note: Callable[[int], dict[str, Any]] = lambda count: {}


def layer_of(neurons: int, density: float) -> SparseLayer:
    """A layer whose edges are there with one chance each, normally distributed weights."""
    generator = np.random.default_rng([neurons, round(1e4 * density)])
    step = max(_CHUNK // neurons, 1)
    counts, indices = [], []
    for first in range(0, neurons, step):
        chosen = generator.random((min(step, neurons - first), neurons), np.float32) < density
        counts.append(chosen.sum(axis=1))
        indices.append(np.nonzero(chosen)[1].astype(np.int32))
    index = np.concatenate(indices)
    values = generator.standard_normal(index.size, np.float32) * np.float32((2 / (neurons * density)) ** 0.5)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    return SparseLayer(indptr, index, values, np.asarray(-0.1, np.float32), neurons)


def activations(neurons: int, count: int) -> jax.Array:
    """float32 (count, neurons) on the device; the rows repeat."""
    rows = np.random.default_rng(neurons).random((min(count, _DISTINCT_FEATURES), neurons), np.float32)
    return jnp.tile(jnp.asarray(rows), (-(-count // len(rows)), 1))[:count]


def contenders(layer: SparseLayer, settings: argparse.Namespace) -> Iterator[Contender]:
    """The kernels first, with which all others are compared."""
    whole = build_plan([layer])
    plain = dataclasses.replace(whole, dense=None)
    yield _ours("kernels", plain, 0.0)
    for precision, tolerance in zip(costs.PRECISIONS, (1e-4, 1e-2, 5e-2), strict=True):
        if settings.gpu or precision == "float32":
            plan = whole if precision == "float32" else plain.with_precision(precision)
            yield _ours(f"infer, {precision}", plan, tolerance)
    for peer in peers.PEERS:
        if settings.gpu or peer.name in _ON_A_CPU:
            yield Contender(
                peer.name,
                functools.partial(peer.prepare, layer),
                lambda count, peer=peer: peer.features(layer, count) == count,
                peer.wait,
                peer.tolerance,
            )


def _ours(name: str, plan: Plan, tolerance: float) -> Contender:
    run = _jitted(infer)

    def is_dense(count: int) -> bool:
        return plan.dense is not None and bool(plan.dense.chosen(plan.table, count))

    return Contender(
        name,
        lambda y: lambda: run(plan, y),
        lambda count: True,
        jax.block_until_ready,
        tolerance,
        lambda count: {"dense": is_dense(count)},
    )


def measure_layer(neurons: int, density: float, results: Results, settings: argparse.Namespace) -> None:
    """All contenders on all counts of features, as far as there is time; those of one count one behind the other."""
    layer = layer_of(neurons, density)
    taking_part = [contender for contender in contenders(layer, settings) if contender.name not in settings.without]
    latest: dict[str, tuple[int, float]] = {}
    for count in settings.features:
        of_kernels: dict[str, Any] = {}
        expected: list[np.ndarray] = []
        for contender in taking_part:
            if time.perf_counter() > settings.end:
                return
            record: dict[str, Any] = {"section": f"{neurons} neurons, {100 * density:g}%", "name": f"{count} features"}
            record |= {"contender": contender.name, "neurons": neurons, "density": density, "features": count}
            record |= {"edges": layer.edges} | contender.note(count)
            before, seconds = latest.get(contender.name, (count, 0.0))
            if 16.0 * count * neurons > settings.memory * 2**30 or not contender.fits(count):
                measured: dict[str, Any] = {"error": "left out: too large"}
            elif (foreseen := seconds * count / before) > settings.limit:
                measured = {"error": f"left out: it would take {foreseen:.1f} s"}
            elif contender.name != "kernels" and not expected:
                measured = {"error": "left out: nothing to compare it with"}
            elif record.get("dense") is False and of_kernels:
                measured = of_kernels | {"same_as": "kernels"}
            else:
                measured = _measured(contender, activations(neurons, count), expected, settings)
            if contender.name == "kernels":
                of_kernels = measured
            if "seconds" in measured:
                latest[contender.name] = count, measured["seconds"]
            results.add(record | measured)
            outcome = measured.get("error") or f"{1e3 * measured['seconds']:.3f} ms"
            print(f"{record['section']}, {record['name']}, {contender.name}: {outcome}", flush=True)


def _measured(
    contender: Contender, y: jax.Array, expected: list[np.ndarray], settings: argparse.Namespace
) -> dict[str, Any]:
    """Its times; the first one's result becomes what is expected of all others."""
    try:
        run = contender.prepare(y)
        result = run()
        contender.wait(result)
        found = peers.on_host(result[:_COMPARED])
        del result
        if not expected:
            expected.append(found)
        error = peers.difference(found, expected[0])
        if error > contender.tolerance:
            raise ValueError(f"its result differs from the kernels' by {error:.1e} of the largest activation")
        timing = measure(run, contender.wait, repeats=settings.repeats, budget=settings.budget)
    except Exception as error:  # whatever one contender dies of, the others are measured
        return {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return timing.as_record() | {"largest_difference": error}


def _parse() -> argparse.Namespace:
    def listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
        return lambda text: [kind(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--neurons", type=listed(int), default=NEURONS)
    parser.add_argument("--density", type=listed(float), default=DENSITIES)
    parser.add_argument("--features", type=listed(int), default=FEATURES)
    parser.add_argument("--without", type=lambda text: text.split(";"), default=[], help="contenders, ';' between them")
    parser.add_argument("--most_edges", type=float, default=1.4e8, help="layers with more are left out")
    parser.add_argument("--memory", type=float, help="GiB of activations; by default 4 on a CPU, 30 on a GPU")
    parser.add_argument("--limit", type=float, default=3.0, help="seconds of a call at most")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for the repeats of one figure")
    parser.add_argument("--time_limit", type=float, default=540.0, help="seconds after which nothing more is begun")
    parser.add_argument("--output", help="by default benchmarks/results/choice_cpu.json or choice_gpu.json")
    settings = parser.parse_args()
    settings.gpu = jax.default_backend() == "gpu"
    settings.memory = settings.memory or (30.0 if settings.gpu else 4.0)
    settings.output = settings.output or f"benchmarks/results/choice_{'gpu' if settings.gpu else 'cpu'}.json"
    return settings


def main() -> None:
    """Measures, writes, prints and draws."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.8")  # the rest is CuPy's
    begin = time.perf_counter()
    settings = _parse()
    kept = {name: value for name, value in vars(settings).items() if name != "output"}
    results = Results(settings.output, kept)
    settings.end = begin + settings.time_limit
    for neurons in settings.neurons:
        for density in settings.density:
            if time.perf_counter() < settings.end and neurons * neurons * density <= settings.most_edges:
                measure_layer(neurons, density, results, settings)
    if time.perf_counter() > settings.end:
        print(f"--time_limit={settings.time_limit:g}: the rest is left out")
    choice_map.report(settings.output)


if __name__ == "__main__":
    main()
