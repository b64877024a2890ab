"""Few features on a GPU: kernel family `spread` beside `chain` or `grouped`, and XLA's dense product in bfloat16.

    python -m benchmarks.cuda_ext.few [--features=1,8,64] [--output=benchmarks/results/few_gpu.json]

Layers are random, a fixed number of edges an output, normally distributed weights. A program runs a network 20 times,
each time on its own result, replayed as one CUDA graph: what the host needs for a call is paid once.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_layers import random_layer
from benchmarks.results_file import Results
from benchmarks.timing import measure
from spdnn_jax import Plan, SparseNetwork, build_plan, infer, ops, planner

_CASES = ((1024, 0.01, 1), (1024, 1 / 32, 120), (4096, 0.01, 10), (4096, 0.1, 1), (16384, 0.01, 1), (16384, 0.1, 1))
"""Neurons, density, layers."""

_AGAIN, _DIFFERENT = 20, 10
_CHAIN_WIDTH = 8192


def random_network(neurons: int, density: float, layers: int) -> SparseNetwork:
    """A network of at most ten different layers, one after the other."""
    generator = np.random.default_rng(neurons)
    rows = np.full(neurons, max(round(neurons * density), 1))
    made = [
        random_layer(generator, neurons, rows, bias=generator.normal(0, 0.1, neurons))
        for _ in range(min(layers, _DIFFERENT))
    ]
    return SparseNetwork(tuple(made[k % len(made)] for k in range(layers)), cap=1.0)


def again_and_again(step: Callable[[Any, jax.Array], jax.Array], weights: Any, y: jax.Array) -> Callable[[], jax.Array]:
    """A compiled program that takes `_AGAIN` steps, each from the result of the last."""

    def run(weights: Any, y: jax.Array) -> jax.Array:
        for _ in range(_AGAIN):
            y = step(weights, y)
        return y

    compiled = jax.jit(run).lower(weights, y).compile(compiler_options=ops.COMPILER_OPTIONS)
    return functools.partial(compiled, weights, y)


def contenders(network: SparseNetwork, neurons: int) -> dict[str, tuple[Callable[[Any, jax.Array], jax.Array], Any]]:
    """Steps and what they take, by name; ours first."""
    families: tuple[planner.Kernel, ...] = ("spread", "chain" if neurons <= _CHAIN_WIDTH else "grouped")
    made: dict[str, Any] = {name: (infer, build_plan(network, kernel=name, precision=None)) for name in families}
    if len(network.layers) == 1:
        matrix = jnp.asarray(network.layers[0].to_scipy().toarray(), jnp.bfloat16)
        made["dense bfloat16"] = (lambda weights, y: jax.nn.relu(y.astype(jnp.bfloat16) @ weights), matrix)
    return made


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=lambda text: list(map(int, text.split(","))), default=[1, 8, 64])
    parser.add_argument("--output", default="benchmarks/results/few_gpu.json")
    settings = parser.parse_args()
    results = Results(settings.output, settings={"features": settings.features})
    for neurons, density, layers in _CASES:
        network = random_network(neurons, density, layers)
        for name, (step, weights) in contenders(network, neurons).items():
            for features in settings.features:
                y = jnp.asarray(np.random.default_rng(0).random((features, neurons), np.float32))
                y = y if isinstance(weights, Plan) else y.astype(jnp.bfloat16)
                timing = measure(again_and_again(step, weights, y), jax.block_until_ready, repeats=7)
                microseconds = timing.median / _AGAIN * 1e6
                shape = f"{neurons}, {density:.3g}, {layers} layers"
                record = {"section": shape, "name": f"{features} features", "contender": name, "steps": _AGAIN}
                results.add(record | {"edges": network.edges} | timing.as_record())
                print(f"{shape}, {features} features, {name}: {microseconds:.1f} us", flush=True)


if __name__ == "__main__":
    main()
