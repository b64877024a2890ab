"""What the modules are made of: a layer whose weights can all be trained."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from spdnn_jax import ops
from spdnn_jax.activation import Clip
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
        layer = weights if bias is None else dataclasses.replace(weights, bias=np.asarray(bias, np.float32))
        layer.validate()
    elif isinstance(weights, sparse.BCOO | sparse.BCSR):
        layer = SparseLayer.from_bcoo(weights, 0.0 if bias is None else bias)
    elif hasattr(weights, "tocoo"):
        layer = SparseLayer.from_scipy(weights, 0.0 if bias is None else bias)
    else:
        layer = SparseLayer.from_dense(weights, 0.0 if bias is None else bias)
    return SparseLayer(
        indptr=jnp.asarray(layer.indptr, jnp.int32),
        indices=jnp.asarray(layer.indices, jnp.int32),
        values=jnp.broadcast_to(jnp.asarray(layer.values, jnp.float32), (layer.edges,)),
        bias=jnp.broadcast_to(jnp.asarray(layer.bias, jnp.float32), (layer.outputs,)),
        inputs=layer.inputs,
    ).with_transposed()


def forward(layer: SparseLayer, y: jax.Array, activation: Clip) -> jax.Array:
    """`layer` of one feature, or of features with any leading axes.

    Args:
        layer: The layer.
        y: float32 (..., inputs).
        activation: What follows the sums.

    Returns:
        float32 (..., outputs).

    Raises:
        ValueError: y has another width or dtype.
    """
    y = jnp.asarray(y)
    leading = y.shape[:-1]
    rows = y.reshape(math.prod(leading), *y.shape[-1:])
    return ops.layer(layer, rows, activation=activation).reshape(*leading, layer.outputs)
