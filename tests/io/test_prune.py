"""`prune_dense`: how many weights stay, which, and what it returns."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdnn_jax import SparseLayer
from spdnn_jax.io import prune_dense


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([(1, 1), (1, 9), (9, 1), (4, 7), (9, 8)]), st.floats(0.001, 1), st.integers(0, 5))
def test_keeps_so_many_of_the_largest(shape: tuple[int, int], density: float, seed: int) -> None:
    """Small integers: ties are broken, too, so that the number is exact. Few shapes: JAX compiles for each."""
    matrix = np.random.default_rng(seed).integers(1, 4, shape) * np.float32(-1)
    pruned = prune_dense(matrix, density)
    kept = pruned != 0
    assert kept.sum() == max(1, round(density * matrix.size))
    np.testing.assert_array_equal(pruned[kept], matrix[kept])
    assert np.abs(matrix[kept]).min() >= np.abs(matrix[~kept]).max(initial=0)
    np.testing.assert_array_equal(prune_dense(jnp.asarray(matrix), density), pruned)


def test_of_equal_weights_the_first_stay() -> None:
    np.testing.assert_array_equal(prune_dense(np.ones((2, 3)), 0.5), [[1, 1, 1], [0, 0, 0]])


def test_matrices_of_a_pytree_keep_their_kind_and_all_else_its_identity() -> None:
    params = {
        "dense": {"kernel": jnp.arange(8, dtype=jnp.bfloat16).reshape(2, 4), "bias": jnp.ones(4)},
        "host": np.eye(3),
        "steps": np.ones((2, 2), np.int32),
        "convolution": np.ones((2, 2, 2)),
        "activation": jax.nn.relu,
        "none": None,
    }
    pruned = prune_dense(params, 0.25)
    kernel = pruned["dense"]["kernel"]
    assert isinstance(kernel, jax.Array)
    assert kernel.dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(kernel, np.float32), [[0, 0, 0, 0], [0, 0, 6, 7]])
    assert type(pruned["host"]) is np.ndarray
    assert pruned["host"].dtype == np.float64
    assert np.count_nonzero(pruned["host"]) == 2
    for name in ("steps", "convolution", "activation", "none"):
        assert pruned[name] is params[name]
    assert pruned["dense"]["bias"] is params["dense"]["bias"]


def test_under_jit_and_into_a_layer() -> None:
    matrix = jax.random.normal(jax.random.key(0), (20, 30))
    pruned = jax.jit(lambda m: prune_dense(m, 0.1))(matrix)
    np.testing.assert_array_equal(pruned, prune_dense(matrix, 0.1))
    assert SparseLayer.from_dense(pruned).edges == 60


@pytest.mark.parametrize("density", [0, -0.1, 1.1, float("nan")])
def test_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match="density must lie above 0"):
        prune_dense(np.eye(2), density)


def test_nothing_to_prune() -> None:
    with pytest.raises(ValueError, match="nothing to prune"):
        prune_dense({"bias": np.ones(3)}, 0.5)
