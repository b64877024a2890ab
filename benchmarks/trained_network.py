"""A network that was trained and pruned: weights that nobody made for a benchmark."""

import re
import tarfile
from pathlib import Path

import numpy as np

from spdnn_jax import Clip, SparseLayer, SparseNetwork


def trained_network(archive: Path) -> SparseNetwork:
    """The trained network of the shared data: indices from 0, a bias a line, dense layers as plain lists of weights.

    Activations stay between 0 and 1; the last layer gives logits.
    """
    layers = []
    with tarfile.open(archive) as tar:

        def table(name: str) -> np.ndarray:
            member = tar.extractfile(name)
            assert member is not None
            return np.loadtxt(member, ndmin=2)

        names = [name for name in tar.getnames() if "/weights/l" in name]
        for name in sorted(names, key=lambda name: int(re.findall(r"/l(\d+)-", name)[0])):
            weights, bias = table(name), table(name.replace("/weights/", "/biases/"))[:, 0]
            if weights.shape[1] == 1:
                matrix = weights.reshape(-1, bias.size)
            else:
                matrix = np.zeros((128, bias.size))
                matrix[weights[:, 0].astype(int), weights[:, 1].astype(int)] = weights[:, 2]
            layers.append(SparseLayer.from_dense(matrix, bias))
    return SparseNetwork(layers, [Clip.relu(1)] * (len(layers) - 1) + [Clip.identity()])
