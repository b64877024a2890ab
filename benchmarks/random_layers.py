"""Layers without the challenge's structure: every output draws its own inputs, or a set that a few outputs share."""

import numpy as np

from spdnn_jax import SparseLayer


def random_layer(
    generator: np.random.Generator,
    inputs: int,
    row_edges: np.ndarray,
    *,
    share: int = 1,
    one_value: bool = False,
    bias: float | np.ndarray = -0.1,
) -> SparseLayer:
    """A layer with random edges and, unless one weight serves all, normally distributed weights.

    Args:
        generator: Source of randomness.
        inputs: Number of input neurons.
        row_edges: Edges of each output neuron, int (outputs,), each at most `inputs`.
        share: Consecutive outputs that share one set of inputs, as large as the first of them says.
        one_value: All weights equal.
        bias: One for all outputs, or (outputs,).
    """
    sets = [generator.choice(inputs, count, replace=False, shuffle=False) for count in row_edges[::share]]
    rows = [np.sort(sets[output // share]) for output in range(len(row_edges))]
    lengths = np.asarray([row.size for row in rows], np.int64)
    edges = int(lengths.sum())
    scale = np.sqrt(2 / max(edges / len(rows), 1))  # keeps activations alive through many layers
    values = np.asarray(scale) if one_value else generator.normal(0, scale, edges)
    return SparseLayer(
        np.concatenate([[0], np.cumsum(lengths)]),
        np.concatenate(rows).astype(np.int32),
        values.astype(np.float32),
        np.asarray(bias, np.float32),
        inputs,
    )
