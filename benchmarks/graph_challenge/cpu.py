"""1024 x 120 on the CPU, beside SciPy, SuiteSparse and dense JAX: one run, one machine, the same data.

    python -m benchmarks.graph_challenge.cpu [--output=benchmarks/results/cpu.json]

Timed: from the input in memory (in each contender's own form) to the categories. Dead features are dropped after every
layer by ours, by SciPy and by SuiteSparse; a dense chain under jit has static shapes and cannot. Weights are generated
(radixnet), inputs are digits (scikit-learn's), float32 throughout.
"""

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.results_file import Results
from benchmarks.timing import Timing, measure_in_turn
from spdnn_jax import build_plan, ops
from spdnn_jax.graph_challenge import inputs, networks, radixnet

NEURONS, LAYERS, FEATURES = 1024, 120, networks.FEATURES
DENSE_FEATURES = 6000  # the dense chain is slow: timed on a tenth of the features, its seconds times ten
OURS, DENSE = "spdnn_jax", "dense jnp float32 (a tenth of the features, times ten)"


def scipy_chain(y0: np.ndarray, weights: list[Any], bias: float) -> Callable[[], np.ndarray]:
    """CSR times dense in float32, rows as neurons: SciPy's fastest form; dead features dropped after every layer."""
    start = np.ascontiguousarray(y0.T, np.float32)

    def run() -> np.ndarray:
        y, live = start, np.arange(y0.shape[0])
        for weight in weights:
            y = weight @ y
            y += np.float32(bias)
            np.clip(y, 0, 32, out=y)
            alive = y.any(axis=0)
            if not alive.all():
                y, live = y[:, alive], live[alive]
        return live

    return run


def graphblas_chain(y0: np.ndarray, weights: list[Any], bias: float) -> Callable[[], np.ndarray] | None:
    """SuiteSparse:GraphBLAS with sparse activations, as its Graph Challenge entries do; None where not installed."""
    try:
        gb: Any = importlib.import_module("graphblas")
    except ImportError:
        return None
    rows, columns = np.nonzero(y0)
    start = gb.Matrix.from_coo(rows, columns, np.float32(1), nrows=y0.shape[0], ncols=y0.shape[1], dtype=gb.dtypes.FP32)
    matrices = [gb.io.from_scipy_sparse(weight.T.tocsr()) for weight in weights]

    def run() -> np.ndarray:
        y = start
        for matrix in matrices:
            y = gb.semiring.plus_times(y @ matrix).new(gb.dtypes.FP32)
            y = gb.op.plus(y, np.float32(bias)).new()
            y = gb.select.value(y > 0).new()
            y = gb.op.min(y, np.float32(32)).new()
        return y.reduce_rowwise(gb.monoid.any).new().to_coo()[0]

    return run


def dense_chain(y0: np.ndarray, weights: list[Any], bias: float) -> Callable[[], Any]:
    """What a JAX user would write: float32 matrix products in a scan."""
    stacked = jnp.asarray(np.stack([weight.T.toarray() for weight in weights]))

    @jax.jit
    def run(y: jax.Array, stacked: jax.Array) -> jax.Array:
        def step(y: jax.Array, weight: jax.Array) -> tuple[jax.Array, None]:
            return jnp.clip(y @ weight + bias, 0, 32), None

        return jax.lax.scan(step, y, stacked)[0].any(axis=1)

    y = jnp.asarray(y0, jnp.float32)
    return lambda: jax.block_until_ready(run(y, stacked))


def main() -> None:
    """Measures, prints a table and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="benchmarks/results/cpu.json")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    y0 = inputs.digits(NEURONS, FEATURES)
    layers = list(radixnet.layers(NEURONS, LAYERS))
    weights = [layer.to_scipy().T.tocsr() for layer in layers]
    bias = radixnet.bias(NEURONS)

    results = Results(arguments.output, vars(arguments))
    planning = measure_in_turn({OURS: lambda: build_plan(layers)}, arguments.repeats)[OURS]
    plan = build_plan(layers)
    on_device = jax.device_put(y0)
    alive, active = ops.categories_and_active(plan, on_device)
    ids = np.flatnonzero(np.asarray(alive))
    contenders: dict[str, Callable[[], Any]] = {
        OURS: lambda: jax.block_until_ready(ops.categories_and_active(plan, on_device)),
        "SciPy CSR, float32, same pruning": scipy_chain(y0, weights, bias),
    }
    if graphblas_run := graphblas_chain(y0, weights, bias):
        contenders["SuiteSparse:GraphBLAS"] = graphblas_run
    for name, run in contenders.items():
        if name != OURS:
            np.testing.assert_array_equal(run(), ids, err_msg=name)
    dense_run = dense_chain(y0[:DENSE_FEATURES], weights, bias)
    np.testing.assert_array_equal(np.flatnonzero(dense_run()), ids[ids < DENSE_FEATURES], err_msg=DENSE)
    timings = measure_in_turn(contenders | {DENSE: dense_run}, arguments.repeats)
    timings[DENSE] = Timing([FEATURES / DENSE_FEATURES * value for value in timings[DENSE].seconds], 1)

    edges = np.asarray(plan.layer_edges)
    multiplied = networks.active_edges(FEATURES, edges, np.asarray(active))
    figures = {"active_edges": multiplied, "nominal_edges": networks.nominal_edges(FEATURES, edges)}
    name = f"{NEURONS} x {LAYERS}, radixnet weights, {FEATURES} digits"
    results.add({"section": "plan", "name": name, "contender": OURS, "edges": plan.edges, **planning.as_record()})
    for contender, timing in timings.items():
        results.add({"section": "categories", "name": name, "contender": contender, **timing.as_record(), **figures})
        spread = f"{min(timing.seconds):.3f} .. {max(timing.seconds):.3f}"
        rate, ratio = multiplied / timing.median / 1e9, timing.median / timings[OURS].median
        print(f"{contender:<55} {timing.median:8.3f} s ({spread})  {rate:7.2f} active GE/s  {ratio:6.1f} x ours")
    print(f"plan: {plan.edges / planning.median / 1e6:.0f} M edges/s")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
