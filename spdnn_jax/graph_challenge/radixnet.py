"""Generates networks like those of the Graph Challenge: butterflies of N / 16 classes, shuffled from group to group.

The construction was read off the official weights: with n = N / 16 and k = log2(n), layer l (from 0) of each group of k
layers joins output j to the inputs i with i mod n in {j mod n, (j + 2^l) mod n}, 32 edges a neuron, all of weight 1/16.
From the second group on, one random permutation per group is applied to the inputs; so layers 1 .. k equal the official
ones, and later ones are of the same kind. (Kepner and Robinett, "RadiX-Net", arXiv 1905.00416.)
"""

import math
from collections.abc import Iterator

import numpy as np

from spdnn_jax.graph_challenge import networks
from spdnn_jax.network import SparseLayer, SparseNetwork

WEIGHT = 1 / 16
_COPIES = 16  # inputs of one class
_OFFICIAL_BIAS = {1024: -0.3, 4096: -0.35, 16384: -0.4, 65536: -0.45}


def bias(neurons: int) -> float:
    """Bias of a network of this width: the official one, or that of the official width nearest on a log scale."""
    return _OFFICIAL_BIAS[min(_OFFICIAL_BIAS, key=lambda official: abs(math.log2(official / neurons)))]


def layers(neurons: int, count: int, seed: int = 0) -> Iterator[SparseLayer]:
    """Generates the layers of a network one by one.

    Args:
        neurons: Width N = 16 * 2^k, k >= 1.
        count: Number of layers.
        seed: Of the permutations.

    Returns:
        An iterator of layers of shape (neurons, neurons), 32 edges a neuron.

    Raises:
        ValueError: The width is not 16 * 2^k, or count is not positive.
    """
    classes = neurons // _COPIES
    if classes < 2 or classes * _COPIES != neurons or classes & (classes - 1):
        raise ValueError(f"neurons must be 16 * 2^k with k >= 1, such as 1024; got {neurons}")
    if count < 1:
        raise ValueError(f"a network needs at least one layer, got {count}")
    return _generate(neurons, classes, count, np.random.default_rng(seed))


def _generate(neurons: int, classes: int, count: int, generator: np.random.Generator) -> Iterator[SparseLayer]:
    group = classes.bit_length() - 1
    indptr = np.arange(neurons + 1, dtype=np.int64) * 2 * _COPIES
    values, layer_bias = np.asarray(WEIGHT, np.float32), np.asarray(bias(neurons), np.float32)
    by_class = (
        np.arange(neurons, dtype=np.int32).reshape(_COPIES, classes).T
    )  # (classes, copies): the inputs of a class
    for number in range(count):
        if number and number % group == 0:
            by_class = generator.permutation(neurons).astype(np.int32).reshape(_COPIES, classes).T
        partner = np.roll(by_class, -(1 << number % group), axis=0)
        rows = np.sort(np.concatenate([by_class, partner], axis=1), axis=1)
        yield SparseLayer(indptr, np.tile(rows, (_COPIES, 1)).reshape(-1), values, layer_bias, neurons)


def network(neurons: int, count: int, seed: int = 0) -> SparseNetwork:
    """The layers of `layers`, all at once, as a network with the challenge's activation."""
    return SparseNetwork(layers(neurons, count, seed), networks.ACTIVATION)
