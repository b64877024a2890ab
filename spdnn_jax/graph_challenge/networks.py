"""The Sparse Deep Neural Network Graph Challenge: its 12 networks, its measure, its answers.

Specification: Kepner et al., "Sparse Deep Neural Network Graph Challenge", HPEC 2019, arXiv 1909.05631.
"""

import array
import os
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from spdnn_jax._files import replacing
from spdnn_jax.activation import Clip

NEURONS = (1024, 4096, 16384, 65536)
LAYERS = (120, 480, 1920)
FEATURES = 60000
EDGES_PER_NEURON = 32
ACTIVATION = Clip.relu(32.0)

PAPER_SECONDS = {
    "1024x120": 0.0113, "1024x480": 0.0365, "1024x1920": 0.140,
    "4096x120": 0.048, "4096x480": 0.142, "4096x1920": 0.543,
    "16384x120": 0.241, "16384x480": 0.783, "16384x1920": 2.99,
    "65536x120": 1.59, "65536x480": 5.94,
}  # fmt: skip
"""Seconds of the paper's own code (arXiv 2007.14152) for 60,000 MNIST features, measured on one H100; the last network
was not run."""

_CATEGORY = re.compile(r"[1-9][0-9]{0,17}")  # what 64 bits hold


def nominal_edges(features: int, layer_edges: np.ndarray) -> int:
    """The challenge's measure of work: features times stored edges of the original network.

    Args:
        features: Number of input features.
        layer_edges: Stored edges of each layer, (layers,).
    """
    return int(features) * int(np.sum(layer_edges, dtype=np.int64))


def active_edges(features: int, layer_edges: np.ndarray, active: np.ndarray) -> int:
    """Edges truly multiplied where dead features are dropped: active features before each layer times its edges.

    Args:
        features: Number of input features.
        layer_edges: Stored edges of each layer, (layers,).
        active: Active features after each layer, (layers,).
    """
    before = np.concatenate([[features], active[:-1]]).astype(np.int64)
    return int(before @ np.asarray(layer_edges, np.int64))


def category_ids(alive: np.ndarray) -> np.ndarray:
    """Categories: the 1-based indices, int64, of the features that are not all zero after the last layer."""
    return np.flatnonzero(alive) + 1


def read_categories(path: str | os.PathLike[str]) -> np.ndarray:
    """Reads a truth file: one 1-based feature index a line.

    Returns:
        int64 (categories,), ascending.

    Raises:
        OSError: The file cannot be read.
        ValueError: A line is no positive integer, is not above the one before, or has no end; the message names it.
    """
    ids, blank = array.array("q"), None  # one after the other: lists of all lines and numbers took many times the file
    with Path(path).open(encoding="utf-8-sig", errors="backslashreplace") as file:  # without a byte-order mark
        for number, line in enumerate(file, start=1):
            if not line.strip():
                blank = blank or number
                continue
            found = _CATEGORY.fullmatch(line.split("\t")[0].strip())
            if blank or not found:
                place, shown = (blank, "") if blank else (number, line[:40].rstrip("\n"))
                raise ValueError(f"{path}, line {place}: expected a feature's index, counted from 1, found {shown!r}")
            if not line.endswith("\n"):
                raise ValueError(f"{path}, line {number}: the line has no end: the file is cut short; fetch it again")
            if ids and int(found[0]) <= ids[-1]:
                raise ValueError(f"{path}, line {number}: {found[0]} follows {ids[-1]}, but categories ascend")
            ids.append(int(found[0]))
    return np.array(ids, np.int64)


def write_categories(path: str | os.PathLike[str], ids: Iterable[int]) -> None:
    """Writes categories as the official truth files do, one 1-based index a line.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    with replacing(path) as file:
        file.write("".join(f"{identity}\n" for identity in ids).encode())
