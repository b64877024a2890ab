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
    """

    activations: np.ndarray
    categories: np.ndarray
    active: np.ndarray


def infer(
    network: SparseNetwork | Iterable[SparseLayer],
    y0: np.ndarray,
    *,
    activation: Clip | Iterable[Clip] | None = None,
    cap: float | EllipsisType | None = ...,
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
        progress: Called after each layer with the number of layers done.

    Returns:
        The activations, categories and active features.

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
    active = []
    outputs = y.shape[0]
    for number, (layer, clip) in enumerate(layers, start=1):
        if layer.inputs != y.shape[0]:
            raise ValueError(f"layer {number} has {layer.inputs} inputs, but its input has {y.shape[0]} neurons")
        outputs = layer.outputs
        if np.clip(layer.bias, clip.lower, clip.upper).any() and live.size < features:
            y, live = _spread(y, live, features), np.arange(features)
        y = _apply(layer, y, clip)
        alive = y.any(axis=0)
        if not alive.all():
            y, live = y[:, alive], live[alive]
        active.append(live.size)
        if progress is not None:
            progress(number)
    categories = np.zeros(features, bool)
    categories[live] = True
    activations = np.zeros((features, outputs))
    activations[live] = y.T
    return Result(activations, categories, np.asarray(active, np.int64))


def _spread(y: np.ndarray, live: np.ndarray, features: int) -> np.ndarray:
    full = np.zeros((y.shape[0], features))
    full[:, live] = y
    return full


def _apply(layer: SparseLayer, y: np.ndarray, clip: Clip) -> np.ndarray:
    require("scipy.sparse", extra="data", purpose="the float64 oracle")
    weights = layer.to_scipy().T.astype(np.float64).tocsr()
    bias = np.broadcast_to(np.asarray(layer.bias, np.float64), (layer.outputs,))[:, None]
    result = np.empty((layer.outputs, y.shape[1]))
    step = max(1, _CHUNK_BYTES // (8 * max(layer.inputs, layer.outputs)))
    for first in range(0, y.shape[1], step):
        part = slice(first, first + step)
        np.clip(weights @ np.ascontiguousarray(y[:, part]) + bias, clip.lower, clip.upper, out=result[:, part])
    return result
