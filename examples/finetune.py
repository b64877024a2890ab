"""Trains an MLP on handwritten digits, drops nine weights of ten, and trains what is left.

Run it as python examples/finetune.py [HIDDEN EPOCHS].
"""

import itertools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from spdnn_jax import Clip, SparseNetwork, build_plan, infer
from spdnn_jax.io import prune_dense
from spdnn_jax.nn.flax import SparseLinear

hidden, epochs = map(int, sys.argv[1:] or (256, 40))
images, digits = load_digits(return_X_y=True)
x, x_test, y, y_test = map(jnp.asarray, train_test_split(images / 16, digits, test_size=0.25, random_state=0))


def train(model: nnx.Module, learning_rate: float) -> None:
    """Adam, in batches of 64."""
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=nnx.Param)

    def loss(model: nnx.Module, x: jax.Array, y: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, y: jax.Array) -> None:
        optimizer.update(model, nnx.grad(loss)(model, x, y))

    generator = np.random.default_rng(0)
    for _ in range(epochs):
        for batch in generator.permutation(len(x))[: len(x) // 64 * 64].reshape(-1, 64):
            step(model, optimizer, x[batch], y[batch])


def accuracy(logits: jax.Array) -> float:
    """Percent of the test images."""
    return 100 * float(jnp.mean(jnp.argmax(logits, axis=1) == y_test))


rngs = nnx.Rngs(0)
widths = (64, hidden, hidden, 10)
linear = [nnx.Linear(before, after, rngs=rngs) for before, after in itertools.pairwise(widths)]
dense = nnx.Sequential(linear[0], nnx.relu, linear[1], nnx.relu, linear[2])
train(dense, 2e-3)
print(f"dense: {accuracy(dense(x_test)):.1f}% of {len(x_test)} test images")

activations = [Clip.relu(), Clip.relu(), Clip.identity()]
sparse_linear = [
    SparseLinear(prune_dense(layer.kernel[...], density=0.1), jnp.asarray(layer.bias), activation=activation)
    for layer, activation in zip(linear, activations, strict=True)
]
sparse = nnx.Sequential(*sparse_linear)
print(f"pruned to 10% of the weights: {accuracy(sparse(x_test)):.1f}%")
train(sparse, 2e-3)

network = SparseNetwork([module.layer for module in sparse_linear], activations)
print(f"fine-tuned, {network.edges:,} edges: {accuracy(infer(build_plan(network), x_test)):.1f}%")
