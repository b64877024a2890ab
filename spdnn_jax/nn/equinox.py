"""`SparseLinear` for Equinox. Needs the extra `equinox`."""

from typing import Any

import jax

from spdnn_jax import ops
from spdnn_jax._extras import require
from spdnn_jax.activation import Clip
from spdnn_jax.network import SparseLayer
from spdnn_jax.nn.trainable import trainable_layer

require("equinox", extra="equinox", purpose="spdnn_jax.nn.equinox")
import equinox as eqx  # noqa: E402


class SparseLinear(eqx.Module):
    """A sparse linear layer: its pattern is fixed, its weights and biases are trained.

    The pattern is integers, which `equinox.filter_grad` passes by, as does `equinox.is_inexact_array`.

    Attributes:
        layer: The layer as it stands, for `SparseNetwork` and `build_plan` after training, too: ``layer.values`` is
            float32 (edges,), ``layer.bias`` float32 (outputs,).
        activation: What follows the sums.
    """

    layer: SparseLayer
    activation: Clip = eqx.field(static=True)

    def __init__(self, weights: Any, bias: Any = None, *, activation: Clip | None = None) -> None:
        """A module that starts from these weights.

        Args:
            weights: A SparseLayer; or weights of shape (inputs, outputs): SciPy, BCOO, BCSR, or a dense matrix, whose
                zeros are no edges (`spdnn_jax.io.prune_dense` makes some). `equinox.nn.Linear` has (outputs, inputs).
            bias: A number, or one for each output. By default that of the SparseLayer, or 0.
            activation: By default none, `Clip.identity()`.

        Raises:
            ValueError: As the builders of `SparseLayer`.
        """
        self.layer = trainable_layer(weights, bias)
        self.activation = activation or Clip.identity()

    def __call__(self, y: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        """float32 (..., inputs) to float32 (..., outputs); `key` is for `equinox.nn.Sequential`, and not used."""
        return ops.layer(self.layer, y, activation=self.activation)
