"""What the tests of derivatives share: a dense twin of a network in plain JAX, and points where it is smooth."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spdnn_jax import SparseNetwork, apply, trainable, with_weights
from spdnn_jax.training import Weights

Function = Callable[..., jax.Array]


def clipped(sums: jax.Array, lower: float, upper: float) -> jax.Array:
    """As jax.nn.relu6 has it: at the bounds the derivative is 0."""
    return jnp.where(sums > lower, jnp.where(sums < upper, sums, jnp.float32(upper)), jnp.float32(lower))


def dense_twin(network: SparseNetwork) -> tuple[Function, tuple[Weights, ...]]:
    """`apply` with dense matrices, of (weights, y), and its weights."""
    weights, _ = trainable(network)
    layers = [(layer, np.repeat(np.arange(layer.outputs), np.diff(layer.indptr))) for layer in network.layers]

    def run(weights: Sequence[Weights], y: jax.Array) -> jax.Array:
        for (layer, rows), own, (lower, upper) in zip(layers, weights, bounds_of(network), strict=True):
            matrix = jnp.zeros(layer.shape).at[np.asarray(layer.indices), rows].set(own.values)
            sums = jnp.matmul(y, matrix, precision="highest")  # a GPU's default rounds to TF32
            y = clipped(sums + jnp.broadcast_to(own.bias, (1, layer.outputs)), lower, upper)
        return y

    return jax.jit(run), weights  # one program instead of one an operation


def sparse_twin(network: SparseNetwork) -> Function:
    """`apply`, of (weights, y)."""
    _, structure = trainable(network)
    return lambda weights, y: apply(with_weights(structure, weights), y)


def smooth_features(network: SparseNetwork, count: int, seed: int = 0) -> jax.Array:
    """Features whose sums lie nowhere near a bound: there finite differences tell the derivative."""
    generator = np.random.default_rng(seed)
    y0 = generator.random((5000, network.inputs), np.float32)
    y, far = y0.astype(np.float64), np.ones(len(y0), bool)
    for layer, (lower, upper) in zip(network.layers, bounds_of(network), strict=True):
        sums = y @ layer.to_scipy().toarray() + np.asarray(layer.bias)
        for bound in (lower, upper):
            far &= (np.abs(sums - bound) > 0.02).all(axis=1)
        y = np.clip(sums, lower, upper)
    assert far.sum() >= count, "the network has hardly a smooth point: choose another"
    return jnp.asarray(y0[far][:count])


def bounds_of(network: SparseNetwork) -> list[tuple[float, float]]:
    """Lower and upper bound of each layer's activation."""
    return [(clip.lower, clip.upper) for clip in network.activation]


def assert_trees_close(got: Any, expected: Any, tolerance: float = 1e-5) -> None:
    """Compares leaf by leaf, relative to the largest element of each."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max(initial=0)))),
        got,
        expected,
    )
