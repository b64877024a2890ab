"""The weights of a network apart from its structure, as an optimiser wants them, and together again."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spdnn_jax.network import SparseNetwork


class Weights(NamedTuple):
    """What of a layer is trained.

    Attributes:
        values: float32 (edges,), or () where one weight serves all edges.
        bias: float32 (outputs,), or ().
    """

    values: jax.Array
    bias: jax.Array


def trainable(network: SparseNetwork) -> tuple[tuple[Weights, ...], SparseNetwork]:
    """Takes a network apart, for `jax.grad` and optimisers, which want leaves that are all floating-point numbers.

        weights, structure = trainable(network)
        loss = lambda weights, structure, y: f(apply(with_weights(structure, weights), y))
        jax.jit(jax.grad(loss))(weights, structure, y)

    Pass the structure to jitted functions as an argument: arrays closed over are compiled in.

    Args:
        network: The network, its arrays on the host or a device: not inside `jit`.

    Returns:
        The weights of each layer, and the network without them, with the index that derivatives read.
    """
    weights = tuple(
        Weights(jnp.asarray(layer.values, jnp.float32), jnp.asarray(layer.bias, jnp.float32))
        for layer in network.layers
    )
    layers = [layer.with_transposed() for layer in network.layers]
    bare = [dataclasses.replace(layer, values=None, bias=None) for layer in layers]
    return weights, dataclasses.replace(network, layers=tuple(bare))


def with_weights(structure: SparseNetwork, weights: Sequence[Weights]) -> SparseNetwork:
    """The reverse of `trainable`.

    Args:
        structure: From `trainable`.
        weights: One a layer.

    Raises:
        ValueError: There are more of them than layers, or fewer.
    """
    if len(weights) != len(structure.layers):
        raise ValueError(f"{len(weights)} layers of weights were given, but the network has {len(structure.layers)}")
    pairs = zip(structure.layers, weights, strict=True)
    layers = tuple(dataclasses.replace(layer, values=own.values, bias=own.bias) for layer, own in pairs)
    return dataclasses.replace(structure, layers=layers)
