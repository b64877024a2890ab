"""Forward plus backward, beside what a JAX user would write: BCOO, dense float32, and on a GPU dense TF32.

    python -m benchmarks.derivatives [--only=weights,features,deep,compile] [--neurons=512,4096] [--density=0.01,0.1]

weights    one layer: its value, and the gradient in features, values and bias
features   four layers: the value of `infer`, and the gradient in the features
deep       `infer` through 30 layers that all differ, rows of all lengths, 1,024 neurons: the same
compile    seconds to trace and compile the gradient of `infer`, and of `apply` in all weights, 120 different layers

Layers are random, weights normally distributed; the activation is a ReLU. Every contender's value and gradient are
compared with ours. A contender that takes more than --memory GiB for its weights, or whose time is foreseen to pass
--limit seconds, is left out, and the record says so.
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from benchmarks.random_layers import random_layer
from benchmarks.results_file import Results
from benchmarks.timing import measure
from spdnn_jax import SparseNetwork, apply, build_plan, infer, trainable, with_weights

SECTIONS = ("weights", "features", "deep", "compile")
NEURONS = (512, 1024, 4096, 16384)
DENSITIES = (0.01, 0.05, 0.1, 0.2)
_FEATURES_LAYERS, _DEEP_LAYERS, _COMPILED_LAYERS = 4, 30, 120

Function = Callable[..., Any]


def random_network(neurons: int, density: float, layers: int, *, irregular: bool = False) -> SparseNetwork:
    """Layers that all differ: by their edges, and where irregular in their number, too, as rows do among themselves."""
    generator = np.random.default_rng(neurons)
    edges = max(round(neurons * density), 1)
    built = []
    for _ in range(layers):
        rows = generator.integers(1, 2 * edges, neurons) if irregular else np.full(neurons, edges)
        built.append(random_layer(generator, neurons, rows, bias=generator.normal(0, 0.1, neurons)))
    return SparseNetwork(tuple(built), cap=None)


def dense_run(y: jax.Array, weights: Sequence[tuple[jax.Array, jax.Array]]) -> jax.Array:
    """The layers with dense weights."""
    for matrix, bias in weights:
        y = jax.nn.relu(y @ matrix + bias)
    return y


def bcoo_run(y: jax.Array, weights: Sequence[tuple[Any, jax.Array]], indices: Sequence[jax.Array]) -> jax.Array:
    """The layers with BCOO weights."""
    for (values, bias), where in zip(weights, indices, strict=True):
        shape = (y.shape[1], bias.shape[0])
        y = jax.nn.relu(y @ sparse.BCOO((values, where), shape=shape, indices_sorted=True, unique_indices=True) + bias)
    return y


def of_value(run: Function, argnums: Any) -> Function:
    """Value and gradient of a weighted sum of the results; the weights of the sum come first."""
    return jax.value_and_grad(lambda sums, *arguments: jnp.sum(run(*arguments) * sums), argnums)


@dataclasses.dataclass(frozen=True)
class Contender:
    """One way to the same value and gradient.

    Attributes:
        name: In the records.
        function: To be compiled.
        arguments: Of it.
        gib: What its weights take.
        compare: Picks what of the gradient can be compared.
    """

    name: str
    function: Function
    arguments: tuple[Any, ...]
    gib: float
    compare: Callable[[Any], Any]


def contenders(
    network: SparseNetwork, y: jax.Array, sums: jax.Array, *, weights: bool, gpu: bool
) -> Iterator[Contender]:
    """Ours first."""
    edges = sum(layer.edges for layer in network.layers)
    if weights:
        leaves, structure = jax.device_put(trainable(network))

        def ours(y: jax.Array, leaves: Any, structure: SparseNetwork) -> jax.Array:
            return apply(with_weights(structure, leaves), y)

        yield Contender(
            "ours", of_value(ours, (1, 2)), (sums, y, leaves, structure), edges * 16 / 2**30, lambda g: g[0]
        )
    else:
        plan = build_plan(network, derivatives=True)
        yield Contender(
            "ours", of_value(lambda y, plan: infer(plan, y), 1), (sums, y, plan), edges * 20 / 2**30, lambda g: g
        )
    argnums: Any = (1, 2) if weights else 1
    compare = (lambda g: g[0]) if weights else lambda g: g
    coordinates = [layer.to_scipy().tocoo() for layer in network.layers]
    matrices = [sparse.BCOO.from_scipy_sparse(matrix.tocsr()).sort_indices() for matrix in coordinates]
    biases = [jnp.asarray(layer.bias) for layer in network.layers]
    pairs = [(matrix.data, bias) for matrix, bias in zip(matrices, biases, strict=True)]
    yield Contender(
        "BCOO", of_value(bcoo_run, argnums), (sums, y, pairs, [matrix.indices for matrix in matrices]),
        edges * len(y) * 4 / len(network.layers) / 2**30, compare,
    )  # fmt: skip
    gib = sum(layer.inputs * layer.outputs for layer in network.layers) * 4 / 2**30
    pairs = [(jnp.asarray(matrix.toarray()), bias) for matrix, bias in zip(coordinates, biases, strict=True)]
    for name, precision in (("dense float32", "highest"), ("dense TF32", "tensorfloat32")):
        if name == "dense float32" or gpu:
            with_precision = jax.default_matmul_precision(precision)(of_value(dense_run, argnums))
            yield Contender(name, with_precision, (sums, y, pairs), gib, compare)


def run_section(
    results: Results, section: str, name: str, network: SparseNetwork, settings: argparse.Namespace
) -> None:
    """Measures all contenders on a network."""
    generator = np.random.default_rng(0)
    y = jnp.asarray(generator.random((settings.features, network.inputs), np.float32))
    sums = jnp.asarray(generator.normal(size=(settings.features, network.outputs)).astype(np.float32))
    expected: Any = None
    for contender in contenders(network, y, sums, weights=section == "weights", gpu=settings.gpu):
        record: dict[str, Any] = {"section": section, "name": name, "contender": contender.name}
        record |= {"features": len(y), "edges": network.edges}
        if contender.gib > settings.memory:
            results.add(record | {"error": f"left out: it takes {contender.gib:.1f} GiB"})
            continue
        start = time.perf_counter()
        compiled = jax.jit(contender.function).lower(*contender.arguments).compile()
        record["compile_seconds"] = time.perf_counter() - start
        value, gradient = jax.block_until_ready(compiled(*contender.arguments))
        got = np.asarray(contender.compare(gradient))
        if expected is None:
            expected = float(value), got
        scale = float(np.abs(expected[1]).max())
        record["largest_difference"] = float(np.abs(got - expected[1]).max()) / scale
        record["relative_difference_of_value"] = abs(float(value) / expected[0] - 1)
        timing = measure(
            lambda c=compiled, a=contender.arguments: c(*a), jax.block_until_ready, repeats=settings.repeats,
            budget=settings.limit,
        )  # fmt: skip
        results.add(record | timing.as_record())
        print(
            f"{section:<9}{name:<18}{contender.name:<14}{timing.median * 1e3:10.2f} ms   compiled in "
            f"{record['compile_seconds']:.2f} s   differs by {record['largest_difference']:.1e}", flush=True,
        )  # fmt: skip


def time_compiling(results: Results) -> None:
    """The section `compile`."""
    network = random_network(1024, 0.02, _COMPILED_LAYERS, irregular=True)
    y, sums = jnp.ones((256, 1024)), jnp.ones((256, 1024))
    for kind in ("infer", "apply"):
        contender = next(contenders(network, y, sums, weights=kind == "apply", gpu=False))
        start = time.perf_counter()
        jax.jit(contender.function).lower(*contender.arguments).compile()
        seconds = time.perf_counter() - start
        name = f"{kind}, {_COMPILED_LAYERS} layers"
        results.add({"section": "compile", "name": name, "contender": "ours", "compile_seconds": seconds})
        print(f"compile  {name}: {seconds:.2f} s", flush=True)


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--neurons", default=",".join(map(str, NEURONS)))
    parser.add_argument("--density", default=",".join(map(str, DENSITIES)))
    parser.add_argument("--features", type=int, help="by default 256 on a CPU, 2,048 on a GPU")
    parser.add_argument("--memory", type=float, default=4.0, help="GiB")
    parser.add_argument("--limit", type=float, default=20.0, help="seconds after which a contender is repeated no more")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--output")
    settings = parser.parse_args()
    settings.gpu = jax.default_backend() == "gpu"
    settings.features = settings.features or (2048 if settings.gpu else 256)
    output = settings.output or f"benchmarks/results/derivatives_{'gpu' if settings.gpu else 'cpu'}.json"
    results = Results(output, vars(settings))
    sections = settings.only.split(",")
    for neurons in map(int, settings.neurons.split(",")):
        for density in map(float, settings.density.split(",")):
            for section, layers in (("weights", 1), ("features", _FEATURES_LAYERS)):
                if section in sections:
                    network = random_network(neurons, density, layers)
                    run_section(results, section, f"{neurons}, {density:.0%}", network, settings)
    if "deep" in sections:
        network = random_network(1024, 0.02, _DEEP_LAYERS, irregular=True)
        run_section(results, "deep", f"1024 x {_DEEP_LAYERS}", network, settings)
    if "compile" in sections:
        time_compiling(results)


if __name__ == "__main__":
    main()
