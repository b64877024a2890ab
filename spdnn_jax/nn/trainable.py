"""What the modules are made of: a layer whose weights can all be trained."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from spdnn_jax import checks
from spdnn_jax.network import SparseLayer


def trainable_layer(weights: Any, bias: Any = None) -> SparseLayer:
    """A layer with a weight of its own for every edge and a bias of its own for every output, on the default device.

    Args:
        weights: A SparseLayer; or weights of shape (inputs, outputs): SciPy, BCOO, BCSR, or a dense matrix, whose zeros
            are no edges.
        bias: A number, or one for each output. By default that of the SparseLayer, or 0.

    Raises:
        ValueError: As the builders of `SparseLayer`.
    """
    if isinstance(weights, SparseLayer):
        layer = weights if bias is None else dataclasses.replace(weights, bias=bias)
        layer = layer.validate().converted()
    elif checks.is_bcoo(weights):
        layer = SparseLayer.from_bcoo(weights, bias)
    elif checks.is_scipy(weights):
        layer = SparseLayer.from_scipy(weights, bias)
    else:
        layer = SparseLayer.from_dense(weights, bias)
    return SparseLayer(
        indptr=jnp.asarray(layer.indptr, jnp.int32),
        indices=jnp.asarray(layer.indices, jnp.int32),
        values=jnp.broadcast_to(jnp.asarray(layer.values, jnp.float32), (layer.edges,)),
        bias=jnp.broadcast_to(jnp.asarray(layer.bias, jnp.float32), (layer.outputs,)),
        inputs=layer.inputs,
    ).with_transposed()
