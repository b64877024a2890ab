"""`SparseLinear` for Flax NNX. Needs the extra `flax`."""

from typing import Any

import jax

from spdnn_jax import ops
from spdnn_jax._extras import require
from spdnn_jax.activation import Clip
from spdnn_jax.network import SparseLayer
from spdnn_jax.nn.trainable import trainable_layer

require("flax", extra="flax", purpose="spdnn_jax.nn.flax")
from flax import nnx  # noqa: E402


class Pattern(nnx.Variable):
    """Where the edges of a layer are: state that is saved with the model and not trained."""


class SparseLinear(nnx.Module):
    """A sparse linear layer: its pattern is fixed, its weights and biases are parameters.

    Attributes:
        values: Param, float32 (edges,): the weights, output by output.
        bias: Param, float32 (outputs,).
        indptr: Pattern, int32 (outputs + 1,), as in `SparseLayer`.
        indices: Pattern, int32 (edges,), as in `SparseLayer`.
        transposed: Pattern, as in `SparseLayer`: what derivatives read.
        inputs: Number of input neurons.
        activation: What follows the sums.
    """

    def __init__(self, weights: Any, bias: Any = None, *, activation: Clip | None = None) -> None:
        """A module that starts from these weights.

        Args:
            weights: A SparseLayer; or weights of shape (inputs, outputs): SciPy, BCOO, BCSR, or a dense matrix, whose
                zeros are no edges (`spdnn_jax.io.prune_dense` makes some).
            bias: A number, or one for each output. By default that of the SparseLayer, or 0.
            activation: By default none, `Clip.identity()`.

        Raises:
            ValueError: As the builders of `SparseLayer`.
        """
        layer = trainable_layer(weights, bias)
        self.values = nnx.Param(layer.values)
        self.bias = nnx.Param(layer.bias)
        self.indptr = Pattern(layer.indptr)
        self.indices = Pattern(layer.indices)
        self.transposed = Pattern(layer.transposed)
        self.inputs = layer.inputs
        self.activation = activation or Clip.identity()

    @property
    def layer(self) -> SparseLayer:
        """The layer as it stands: for `SparseNetwork` and `build_plan` after training."""
        pattern = self.indptr[...], self.indices[...]
        return SparseLayer(*pattern, self.values[...], self.bias[...], self.inputs, self.transposed.get_value())

    def __call__(self, y: jax.Array) -> jax.Array:
        """float32 (..., inputs) to float32 (..., outputs)."""
        return ops.layer(self.layer, y, activation=self.activation)
