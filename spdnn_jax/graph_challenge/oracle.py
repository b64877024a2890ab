"""The oracle: inference in float64 with SciPy, one layer after the other, as plainly as it can be said."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import EllipsisType

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax.activation import Clip, paired, resolve
from spdnn_jax.network import SparseLayer, SparseNetwork

_CHUNK_BYTES = 1 << 28


@dataclass(frozen=True)
class Result:
    """What the oracle found.

    Attributes:
        activations: float64 (features, outputs).
        categories: bool (features,): not all zero after the last layer.
        active: int64 (layers,): features not all zero after each layer.
        errors: float64 (features, outputs): how far at most float32 activations may lie from these, whatever the order
            of their sums (docs/numerics.md); None where not asked for.
    """

    activations: np.ndarray
    categories: np.ndarray
    active: np.ndarray
    errors: np.ndarray | None = None

    @property
    def close_calls(self) -> np.ndarray:
        """Features whose category may be another one in float32, for some sum lies so near to zero: bool (features,).

        Raises:
            ValueError: Errors were not asked for.
        """
        if self.errors is None:
            raise ValueError("close calls are told by errors: call infer(..., errors=True)")
        size = np.abs(self.activations)
        return ((size != 0) | (self.errors != 0)).any(axis=1) & ~(size > self.errors).any(axis=1)


def infer(
    network: SparseNetwork | Iterable[SparseLayer],
    y0: np.ndarray,
    *,
    activation: Clip | Iterable[Clip] | None = None,
    cap: float | EllipsisType | None = ...,
    errors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Runs features through a network in float64.

    Features that are all zero are skipped for as long as layers make zeros of zeros, and are zero then; any other layer
    is computed for all features, for it brings them to life.

    Args:
        network: A network, or its layers in order.
        y0: The features, one a row, (features, inputs), of any real dtype.
        activation: One for all layers, or one a layer; by default the challenge's ``Clip.relu(32)``. Only for an
            iterable; a `SparseNetwork` has its own.
        cap: Short for ``activation=Clip.relu(cap)``.
        errors: Whether to bound the error of float32, too, which doubles the work.
        progress: Called after each layer with the number of layers done.

    Returns:
        The activations, categories and active features, and errors where asked for.

    Raises:
        ValueError: The features are no matrix or have another width than a layer has inputs, or the activations are
            none, or not as many as the layers.
    """
    if isinstance(network, SparseNetwork):
        layers = paired(network.layers, network.activation)
    else:
        layers = paired(network, resolve(activation, cap))
    if np.ndim(y0) != 2:
        raise ValueError(f"the features must have shape (features, inputs), got {np.shape(y0)}")
    features = len(y0)
    live = np.arange(features)
    y = np.ascontiguousarray(np.asarray(y0).T, np.float64)  # (neurons, live features): SciPy's fast orientation
    e = np.zeros_like(y) if errors else None
    active = []
    for number, (layer, clip) in enumerate(layers, start=1):
        if layer.inputs != y.shape[0]:
            raise ValueError(f"layer {number} has {layer.inputs} inputs, but its input has {y.shape[0]} neurons")
        if np.clip(layer.bias, clip.lower, clip.upper).any() and live.size < features:
            y, e = _spread(y, live, features), None if e is None else _spread(e, live, features)
            live = np.arange(features)
        y, e = _apply(layer, y, e, clip)
        alive = y.any(axis=0)
        active.append(int(alive.sum()))
        if e is not None:
            alive |= e.any(axis=0)  # all zero here, perhaps not in float32
        if not alive.all():
            y, e, live = y[:, alive], None if e is None else e[:, alive], live[alive]
        if progress is not None:
            progress(number)
    y = _spread(y, live, features)
    return Result(
        np.ascontiguousarray(y.T),
        np.any(y, axis=0, keepdims=True)[0],
        np.asarray(active, np.int64),
        None if e is None else np.ascontiguousarray(_spread(e, live, features).T),
    )


def _spread(y: np.ndarray, live: np.ndarray, features: int) -> np.ndarray:
    full = np.zeros((y.shape[0], features))
    full[:, live] = y
    return full


def _apply(layer: SparseLayer, y: np.ndarray, e: np.ndarray | None, clip: Clip) -> tuple[np.ndarray, np.ndarray | None]:
    """A layer's activations, and how far off they may be in float32 where its inputs are off by e."""
    require("scipy.sparse", extra="data", purpose="the float64 oracle")
    weights = layer.to_scipy().T.astype(np.float64).tocsr()
    sizes, gamma = abs(weights), _gamma(np.diff(weights.indptr) + 1)[:, None]
    bias = np.broadcast_to(np.asarray(layer.bias, np.float64), (layer.outputs,))[:, None]
    result = np.empty((layer.outputs, y.shape[1]))
    off = None if e is None else np.empty_like(result)
    step = max(1, _CHUNK_BYTES // (8 * max(layer.inputs, layer.outputs)))
    for first in range(0, y.shape[1], step):
        part = slice(first, first + step)
        inputs = np.ascontiguousarray(y[:, part])
        sums = weights @ inputs + bias
        np.clip(sums, clip.lower, clip.upper, out=result[:, part])
        if e is None or off is None:
            continue
        input_errors = np.ascontiguousarray(e[:, part])
        largest = sizes @ (np.abs(inputs) + input_errors) + np.abs(bias)
        bound = gamma * largest + (sizes @ input_errors if input_errors.any() else 0)
        above = np.clip(sums + bound, clip.lower, clip.upper) - result[:, part]
        below = result[:, part] - np.clip(sums - bound, clip.lower, clip.upper)
        np.maximum(above, below, out=off[:, part])
    return result, off


def _gamma(operations: np.ndarray) -> np.ndarray:
    """The relative error of so many float32 operations in a row (Higham, section 3.1)."""
    unit = 2.0**-24
    return operations * unit / (1 - operations * unit)
