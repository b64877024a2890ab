"""The oracle: inference in float64 with SciPy, one layer after the other, as plainly as it can be said."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax.network import SparseLayer, SparseNetwork, check_cap

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
    cap: float | None = 32.0,
    progress: Callable[[int], None] | None = None,
) -> Result:
    """Runs features through a network in float64.

    Features that are all zero are skipped for as long as the biases are not positive, and are zero then; a layer with a
    positive bias is computed for all features, for it brings them to life.

    Args:
        network: A network, or its layers in order.
        y0: The features, one a row, (features, inputs), of any real dtype.
        cap: Upper clip of every layer, None for none. Only for an iterable; a `SparseNetwork` has its own.
        progress: Called after each layer with the number of layers done.

    Returns:
        The activations, categories and active features.

    Raises:
        ValueError: The features are no matrix or have another width than a layer has inputs, or the cap is not
            positive.
    """
    layers = network.layers if isinstance(network, SparseNetwork) else network
    cap = network.cap if isinstance(network, SparseNetwork) else cap
    check_cap(cap)
    upper = np.inf if cap is None else cap
    if np.ndim(y0) != 2:
        raise ValueError(f"the features must have shape (features, inputs), got {np.shape(y0)}")
    features = len(y0)
    live = np.arange(features)
    y = np.ascontiguousarray(np.asarray(y0).T, np.float64)  # (neurons, live features): SciPy's fast orientation
    active = []
    outputs = y.shape[0]
    for number, layer in enumerate(layers, start=1):
        if layer.inputs != y.shape[0]:
            raise ValueError(f"layer {number} has {layer.inputs} inputs, but its input has {y.shape[0]} neurons")
        outputs = layer.outputs
        if np.max(layer.bias, initial=-np.inf) > 0 and live.size < features:
            y, live = _spread(y, live, features), np.arange(features)
        y = _apply(layer, y, upper)
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


def _apply(layer: SparseLayer, y: np.ndarray, upper: float) -> np.ndarray:
    require("scipy.sparse", extra="data", purpose="the float64 oracle")
    weights = layer.to_scipy().T.astype(np.float64).tocsr()
    bias = np.broadcast_to(np.asarray(layer.bias, np.float64), (layer.outputs,))[:, None]
    result = np.empty((layer.outputs, y.shape[1]))
    step = max(1, _CHUNK_BYTES // (8 * max(layer.inputs, layer.outputs)))
    for first in range(0, y.shape[1], step):
        part = slice(first, first + step)
        np.clip(weights @ np.ascontiguousarray(y[:, part]) + bias, 0, upper, out=result[:, part])
    return result
