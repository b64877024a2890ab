"""Layers with the patterns that real networks have: pruned by magnitude, banded, in blocks, convolutions."""

from collections.abc import Callable

import numpy as np
import scipy.sparse as sp

from spdnn_jax import SparseLayer


def magnitude_pruned(
    generator: np.random.Generator, inputs: int, outputs: int, pruned: float, *, uneven: float = 0.3
) -> SparseLayer:
    """The largest weights of a dense layer whose rows and columns differ in scale, as in pruned transformers.

    Trained matrices have a few inputs and outputs of much larger weights than the others. A threshold for the whole
    layer then leaves most of its edges there: at 90% pruned and the default, the fullest of 1,024 outputs has four
    times the average, one in twenty a tenth of it.

    Args:
        generator: Source of randomness.
        inputs: Number of input neurons.
        outputs: Number of output neurons.
        pruned: Share of the weights that are left out, by their size; 0.7 to 0.98 is what is published.
        uneven: Standard deviation of the logarithm of the scale of inputs, and of outputs.
    """
    scale = np.exp(generator.normal(0, uneven, (inputs, 1))) * np.exp(generator.normal(0, uneven, outputs))
    dense = generator.normal(size=(inputs, outputs)) * scale
    threshold = np.quantile(np.abs(dense), pruned)
    return _scaled(sp.csc_array(np.where(np.abs(dense) > threshold, dense, 0)))


def banded(generator: np.random.Generator, inputs: int, outputs: int, bandwidth: int) -> SparseLayer:
    """Each output reads `bandwidth` inputs or fewer that lie side by side, around its own place."""
    centre = np.arange(outputs) * inputs // outputs
    places = centre[:, None] + np.arange(bandwidth) - bandwidth // 2
    inside = (places >= 0) & (places < inputs)
    output = np.broadcast_to(np.arange(outputs)[:, None], places.shape)
    return _of_edges(places[inside], output[inside], generator.normal(size=int(inside.sum())), (inputs, outputs))


def blocks(
    generator: np.random.Generator, inputs: int, outputs: int, density: float, *, block: int = 16
) -> SparseLayer:
    """Dense blocks of `block` x `block` weights, the last ones cut off where the layer ends, a share of them kept."""
    kept = generator.random((-(-inputs // block), -(-outputs // block))) < density
    pattern = np.kron(kept, np.ones((block, block), bool))[:inputs, :outputs]
    return _scaled(sp.csc_array(np.where(pattern, generator.normal(size=pattern.shape), 0)))


def convolution(
    generator: np.random.Generator, height: int, width: int, channels: int, kernels: int, *, side: int = 3
) -> SparseLayer:
    """A convolution with zero padding, as a matrix: inputs are [height, width, channel], outputs [.., kernel].

    Every place has the same weights, and the outputs of one place read the same inputs.
    """
    weights = generator.normal(size=(side, side, channels, kernels))
    y, x, dy, dx, channel, kernel = (
        axis.ravel() for axis in np.indices((height, width, side, side, channels, kernels), sparse=False)
    )
    from_y, from_x = y + dy - side // 2, x + dx - side // 2
    inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
    source = ((from_y * width + from_x) * channels + channel)[inside]
    target = ((y * width + x) * kernels + kernel)[inside]
    values = weights[dy, dx, channel, kernel][inside]
    return _of_edges(source, target, values, (height * width * channels, height * width * kernels))


PATTERNS: dict[str, Callable[[np.random.Generator, int], SparseLayer]] = {
    "pruned 70%": lambda generator, neurons: magnitude_pruned(generator, neurons, neurons, 0.7),
    "pruned 90%": lambda generator, neurons: magnitude_pruned(generator, neurons, neurons, 0.9),
    "pruned 98%": lambda generator, neurons: magnitude_pruned(generator, neurons, neurons, 0.98),
    "banded": lambda generator, neurons: banded(generator, neurons, neurons, max(neurons // 32, 1)),
    "blocks of 16": lambda generator, neurons: blocks(generator, neurons, neurons, 0.1),
    "convolution": lambda generator, neurons: convolution(generator, *_image(neurons), 4, 4),
}
"""Square layers of about so many neurons, by name."""


def _image(neurons: int) -> tuple[int, int]:
    """Sides of an image of about neurons / 4 pixels."""
    side = max(round((neurons / 4) ** 0.5), 1)
    return side, side


def _of_edges(inputs: np.ndarray, outputs: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> SparseLayer:
    return _scaled(sp.csc_array((values, (inputs, outputs)), shape=shape))


def _scaled(weights: sp.csc_array) -> SparseLayer:
    """The layer, its weights scaled so that activations stay alive through many layers."""
    squares, outputs = float((weights.data**2).sum()), weights.indptr.size - 1
    scale = np.sqrt(2 * outputs / squares) if squares else 1.0
    return SparseLayer.from_scipy((weights * scale).astype(np.float32), bias=-0.1)
