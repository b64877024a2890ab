"""Lossless rewrites of a network: merge equal neurons, fold constant ones, drop unread ones.

In exact arithmetic they change nothing, whatever the network and its (finite) input; in float32, sums may round
differently. Nothing is assumed of a network: one without equal neurons comes out as it went in.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np

from spdnn_jax._native import core, usable_cores
from spdnn_jax.activation import Clip
from spdnn_jax.network import SparseLayer, SparseNetwork, as_network, native_arrays

Compress = Literal["none", "neurons", "full"]
"""Lossless compression: none; of equal neurons, once for the network; of equal features, too, while it runs."""

COMPRESS: tuple[Compress, ...] = ("none", "neurons", "full")

_WHOLE_HASH = 2**64 - 1


@dataclass(frozen=True, eq=False)
class Expansion:
    """Where a simplified network holds the outputs of the original one.

    Attributes:
        outputs: int32 (original outputs,): the output of the simplified network that each one equals.
    """

    outputs: np.ndarray

    def expand(self, y: jax.Array) -> jax.Array:
        """Restores the original outputs: from shape (..., simplified outputs) to (..., original outputs)."""
        return y[..., self.outputs]


def simplify(network: SparseNetwork) -> tuple[SparseNetwork, Expansion]:
    """Makes a network smaller that computes the same.

    Neurons with the same incoming edges, weights and bias always agree: one of each class stays, and the outgoing
    weights of a class are added up (in float64, rounded once). A neuron without edges is a constant and goes into the
    next layer's biases. What no later layer reads is dropped. All of this goes on through the layers until nothing is
    left to do. Rows are compared exactly; the input neurons stay as they are, and a layer keeps one neuron at least.

    Args:
        network: Any network.

    Returns:
        The smaller network and what restores all of the original outputs from its outputs.

    Raises:
        ValueError: A layer is malformed, or weights that are added up pass the range of float32.
    """
    network = as_network(network)
    simplified = Simplified(zip(network.layers, network.activation, strict=True))
    layers = tuple(layer for layer, _, _ in simplified)
    return SparseNetwork(layers, network.activation), simplified.expansion


class Simplified(Iterable[tuple[SparseLayer, Clip, "core.LayerOrigin"]]):
    """A simplified network, from layers taken one at a time: holds one of them beside the result.

    Iterating, once, hands out each layer with its activation and what became of its original, and lets go of it.

    Attributes:
        expansion: Restores the original outputs.
    """

    def __init__(
        self,
        layers: Iterable[tuple[SparseLayer, Clip]],
        *,
        threads: int | None = None,
        progress: Callable[[int], None] | None = None,
        hash_mask: int = _WHOLE_HASH,
    ) -> None:
        """Simplifies the layers.

        Args:
            layers: The layers in order, each with its activation.
            threads: By default, the cores this process may use.
            progress: Called after each layer with the number of layers taken so far.
            hash_mask: Bits of a row's hash to use; for tests, which force collisions.

        Raises:
            ValueError: As for `simplify`.
        """
        self._native = core.Simplifier(threads or usable_cores(), hash_mask)
        self._activation: list[Clip] = []
        for count, (layer, activation) in enumerate(layers, start=1):
            self._native.add(**native_arrays(layer, activation, count))
            self._activation.append(activation)
            if progress is not None:
                progress(count)
        self._native.finish()
        self.expansion = Expansion(self._native.expansion())

    def __iter__(self) -> Iterator[tuple[SparseLayer, Clip, "core.LayerOrigin"]]:
        for activation in self._activation:
            taken = self._native.take()
            if taken is None:
                return
            inputs, indptr, indices, values, bias, origin = taken
            layer = SparseLayer(indptr, indices, _scalar_if_one(values), _scalar_if_one(bias), inputs)
            yield layer, activation, origin


def _scalar_if_one(array: np.ndarray) -> np.ndarray:
    return array.reshape(()) if array.size == 1 else array
