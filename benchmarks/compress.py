"""What lossless compression gains where there is something to merge, and costs where there is nothing.

    python -m benchmarks.compress [--output=FILE] [--networks=1024x120,...] [--trained=mnist-128x18.tar.gz]

Each network runs with every --compress setting in turn, on the device that JAX picks: from the input on the device to
the categories on the device. All settings must give the same categories. The challenge's networks have equal neurons
and features; a random network (32 random inputs an output, normally distributed weights) and a trained one have none.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.random_layers import random_layer
from benchmarks.results_file import Results
from benchmarks.timing import measure_in_turn
from benchmarks.trained_network import trained_network
from spdnn_jax import SparseNetwork, build_plan, ops
from spdnn_jax.command_line import report
from spdnn_jax.graph_challenge import radixnet
from spdnn_jax.graph_challenge.inputs import digits, mnist
from spdnn_jax.graph_challenge.networks import EDGES_PER_NEURON, FEATURES
from spdnn_jax.simplify import COMPRESS

_RANDOM = (1024, 40, 10_000)  # neurons, layers, features


def networks(settings: argparse.Namespace) -> Iterator[tuple[str, Callable[[], SparseNetwork], np.ndarray]]:
    """Name, what reads or makes it, and the input of each network."""
    for name in settings.networks.split(","):
        neurons, layers = map(int, name.split("x"))
        count = FEATURES
        if settings.mnist_dir:
            y0, inputs = mnist(settings.mnist_dir, neurons, count), "MNIST"
        else:
            y0, inputs = digits(neurons, count), "digits"
        yield f"challenge {name}, {count} {inputs}", functools.partial(radixnet.network, neurons, layers), y0
    generator = np.random.default_rng(0)
    neurons, layers, count = _RANDOM
    rows = np.full(neurons, EDGES_PER_NEURON)
    random = SparseNetwork(tuple(random_layer(generator, neurons, rows, bias=0.05) for _ in range(layers)))
    yield f"random {neurons}x{layers}, {count} random", lambda: random, generator.random((count, neurons), np.float32)
    if settings.trained:
        trained = trained_network(settings.trained)
        y0 = generator.random((60_000, trained.inputs), np.float32)
        yield f"trained 128x{len(trained.layers)}, {len(y0)} random", lambda: trained, y0


def measure(name: str, network: Callable[[], SparseNetwork], y0: np.ndarray, repeats: int) -> dict[str, Any]:
    """Seconds and figures of one network with every setting."""
    on_device = jax.device_put(y0)
    runs, figures, answers = {}, {}, {}
    for compress in COMPRESS:
        start = time.perf_counter()
        plan = build_plan(network(), compress=compress)
        seconds = time.perf_counter() - start
        compiled = jax.jit(ops.categories).lower(plan, on_device).compile(compiler_options=ops.COMPILER_OPTIONS)
        answers[compress] = np.asarray(compiled(plan, on_device))
        runs[compress] = lambda compiled=compiled, plan=plan: jax.block_until_ready(compiled(plan, on_device))
        figures[compress] = {
            "read_and_plan_seconds": seconds,
            "edges": plan.edges,
            "multiplied_edges": int(plan.multiplied_edges.sum()),
        }
    for compress, timing in measure_in_turn(runs, repeats).items():
        np.testing.assert_array_equal(answers[compress], answers["none"], err_msg=f"{name}, --compress={compress}")
        figures[compress] |= timing.as_record()
    return figures


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/compress.json")
    parser.add_argument("--networks", default="1024x120")
    parser.add_argument("--mnist_dir", help="folder of the MNIST files in IDX form; digits without it")
    parser.add_argument("--trained", help="archive of the trained network")
    parser.add_argument("--repeats", type=int, default=9)
    settings = parser.parse_args()
    results = Results(settings.output, vars(settings))
    for name, network, y0 in networks(settings):
        figures = measure(name, network, y0, settings.repeats)
        for compress, figure in figures.items():
            results.add({"section": "compress", "name": name, "contender": compress, **figure})
            ratio = figures["none"]["seconds"] / figure["seconds"]
            share = figure["multiplied_edges"] / figure["edges"]
            print(
                f"{name:<40} {compress:<8} {report.duration(figure['seconds']):>9}  {ratio:5.2f} x as fast as none  "
                f"{share:6.1%} of the edges  read and plan {report.duration(figure['read_and_plan_seconds'])}"
            )
    print(f"wrote {settings.output}")


if __name__ == "__main__":
    main()
