"""One layer on few features on the CPU, beside SciPy, a dense product and BCOO: the time of a call.

    python -m benchmarks.few [--cores=1] [--neurons=512,4096] [--density=0.01,0.1] [--features=1,8,64,512]
    python -m benchmarks.few --pattern='pruned 90%'

Timed: from activations to activations, product, bias and ReLU, one call at a time; each contender has its weights and
its activations in memory in its own form (SciPy: CSR with a row an output, activations with a row a neuron, which is
its fastest). SciPy runs on one core, whatever there are. Every contender's result is compared with ours. One whose
weights take more than --memory GiB, or whose calls take more than --limit seconds, is left out, and the record says so.
"""

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.timing import measure

NEURONS = (512, 1024, 4096, 20000)
DENSITIES = (0.001, 0.01, 0.1, 0.5)
FEATURES = (1, 8, 64, 512)
BIAS = np.float32(-0.1)


@dataclass(frozen=True)
class Contender:
    """What is timed: `run` takes nothing and returns what `wait` waits for, `result` is (features, outputs) of it."""

    name: str
    nbytes: int
    make: Callable[[np.ndarray], Callable[[], Any]]
    result: Callable[[Any], np.ndarray] = np.asarray


def contenders(layer: Any) -> list[Contender]:
    """Ours first."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import sparse

    from spdnn_jax import Clip, SparseNetwork, build_plan, infer

    plan = build_plan(SparseNetwork((layer,), Clip.relu()))
    rows = layer.to_scipy().T.tocsr()

    def ours(y: np.ndarray) -> Callable[[], Any]:
        on_device = jax.device_put(y)
        return lambda: jax.block_until_ready(infer(plan, on_device))

    def scipy(y: np.ndarray) -> Callable[[], Any]:
        columns = np.ascontiguousarray(y[0] if len(y) == 1 else y.T)

        def run() -> np.ndarray:
            sums = rows @ columns
            sums += BIAS
            return np.maximum(sums, 0, out=sums)

        return run

    def dense(y: np.ndarray) -> Callable[[], Any]:
        weights, on_device = jnp.asarray(rows.toarray().T), jax.device_put(y)
        step = jax.jit(lambda y, weights: jax.nn.relu(y @ weights + BIAS))
        return lambda: jax.block_until_ready(step(on_device, weights))

    def bcoo(y: np.ndarray) -> Callable[[], Any]:
        weights, on_device = sparse.BCOO.from_scipy_sparse(rows), jax.device_put(y.T)
        step = jax.jit(lambda y, weights: jax.nn.relu(weights @ y + BIAS))
        return lambda: jax.block_until_ready(step(on_device, weights))

    def transposed(y: Any) -> np.ndarray:
        return np.atleast_2d(np.asarray(y).T)

    return [
        Contender("spdnn_jax", plan.nbytes, ours),
        Contender("SciPy CSR", 8 * rows.nnz + 4 * (rows.shape[0] + 1), scipy, transposed),
        Contender("dense float32", 4 * rows.shape[0] * rows.shape[1], dense),
        Contender("BCOO", 12 * rows.nnz, bcoo, transposed),
    ]


def measure_layer(layer: Any, name: str, features: list[int], results: Any, arguments: argparse.Namespace) -> None:
    """All contenders on all counts of features; one line each."""
    generator = np.random.default_rng(1)
    for contender in contenders(layer):
        for count in features:
            record = {"section": name, "name": f"{count} features", "contender": contender.name}
            record |= {"edges": layer.edges, "features": count, "nbytes": contender.nbytes}
            y = generator.random((count, layer.inputs), np.float32)
            if contender.nbytes > arguments.memory * 2**30:
                results.add(record | {"error": f"weights of {contender.nbytes / 2**30:.1f} GiB"})
                continue
            run = contender.make(y)
            run()
            start = time.perf_counter()
            found = contender.result(run())
            if (seconds := time.perf_counter() - start) > arguments.limit:
                results.add(record | {"error": f"takes {seconds:.1f} s"})
                continue
            expected = y[:8].astype(np.float64) @ layer.to_scipy()
            np.testing.assert_allclose(found[:8], np.maximum(expected + BIAS, 0), rtol=1e-3, atol=1e-3)
            timing = measure(run, lambda done: done, repeats=arguments.repeats, calls=1, budget=arguments.budget)
            results.add(record | timing.as_record())


def print_table(content: dict[str, Any]) -> None:
    """A line for each layer and count of features: our milliseconds, and how many times as long the others take."""
    table: dict[tuple[str, str], dict[str, float]] = {}
    for record in content["records"]:
        row = table.setdefault((record["section"], record["name"]), {})
        if "seconds" in record:
            row[record["contender"]] = record["seconds"]
    names = [name for name in ("SciPy CSR", "dense float32", "BCOO") if any(name in row for row in table.values())]
    print("| layer | | ours, ms | " + " | ".join(names) + " |\n| --- | --- | ---: |" + " ---: |" * len(names))
    for (layer, count), row in table.items():
        if "spdnn_jax" in row:
            others = [f"{row[name] / row['spdnn_jax']:.1f} x" if name in row else "-" for name in names]
            print(f"| {layer} | {count} | {1e3 * row['spdnn_jax']:.3f} | {' | '.join(others)} |")


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--neurons", default=",".join(map(str, NEURONS)))
    parser.add_argument("--density", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--features", default=",".join(map(str, FEATURES)))
    parser.add_argument("--pattern", help="instead of random edges: a name of patterns.PATTERNS")
    parser.add_argument("--most_edges", type=float, default=2.5e7, help="layers with more are left out")
    parser.add_argument("--memory", type=float, default=2.0, help="GiB of a contender's weights at most")
    parser.add_argument("--limit", type=float, default=1.0, help="seconds of a contender's call at most")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for the repeats of one figure")
    parser.add_argument("--output", help="by default benchmarks/results/few_CORES_cores.json")
    arguments = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])  # before JAX makes its threads

    from benchmarks.patterns import PATTERNS
    from benchmarks.random_layers import random_layer
    from benchmarks.results_file import Results

    output = arguments.output or f"benchmarks/results/few_{arguments.cores}_cores.json"
    results = Results(output, {"repeats": arguments.repeats})
    features = [int(count) for count in arguments.features.split(",")]
    for neurons in map(int, arguments.neurons.split(",")):
        generator = np.random.default_rng(neurons)
        if arguments.pattern:
            layer = PATTERNS[arguments.pattern](generator, neurons)
            measure_layer(layer, f"{layer.outputs:,} neurons, {arguments.pattern}", features, results, arguments)
            continue
        for density in map(float, arguments.density.split(",")):
            edges = max(round(neurons * density), 1)
            if edges * neurons > arguments.most_edges:
                continue
            layer = random_layer(generator, neurons, np.full(neurons, edges), bias=float(BIAS))
            measure_layer(layer, f"{neurons:,} neurons, {100 * density:g}%", features, results, arguments)
    print_table(results.content)


if __name__ == "__main__":
    main()
