"""Pruning of dense weights: by magnitude, each matrix for itself."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def prune_dense(params: Any, density: float) -> Any:
    """Keeps the largest weights of each dense matrix and sets the others to zero.

    Of a matrix of n weights the round(density * n) of largest magnitude stay, at least one; among equal ones those that
    come first, row by row, so that the number is exact and the choice always the same. Which axis is inputs does not
    matter. Can be jitted. `SparseLayer.from_dense` makes a layer of what is left.

    Args:
        params: A matrix, or any pytree (a Flax state, an Equinox module, a dict of arrays).
        density: Share of weights to keep, above 0 and at most 1.

    Returns:
        The pytree, with each leaf that is a floating-point array of two axes replaced by one of the same shape, dtype
        and kind (NumPy or JAX), zero where weights were dropped. All other leaves (biases, convolutions, integers) are
        the same objects as before.

    Raises:
        ValueError: density is no such share, or there is no matrix in `params`.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density must lie above 0 and be at most 1, got {density}")
    leaves, structure = jax.tree.flatten(params)
    if not any(map(_is_matrix, leaves)):
        raise ValueError("there is nothing to prune: no leaf is a floating-point array of two axes")
    return jax.tree.unflatten(structure, [_prune(leaf, density) if _is_matrix(leaf) else leaf for leaf in leaves])


def _is_matrix(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and leaf.ndim == 2 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _prune(matrix: Any, density: float) -> Any:
    numpy = np if isinstance(matrix, np.ndarray) else jnp
    kept = max(1, round(density * matrix.size))
    order = numpy.lexsort((-numpy.abs(matrix).reshape(-1),))  # stable, in both
    rank = numpy.lexsort((order,))
    return numpy.where(rank.reshape(matrix.shape) < kept, matrix, numpy.zeros((), matrix.dtype))
