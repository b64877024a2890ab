"""Features in every form: dtypes, leading axes, bit packing."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spdnn_jax import apply, build_plan, categories, infer, layer, ops, pack_bits
from tests.conftest import dense_reference, random_network

NETWORK = random_network(3, [40, 30, 20], grouped=3)
PLAN = build_plan(NETWORK)
ENTRIES: dict[str, Callable[[Any, ops.Backend], jax.Array]] = {
    "infer": lambda y, backend: infer(PLAN, y, backend=backend),
    "apply": lambda y, backend: apply(NETWORK, y, backend=backend),
    "layers": lambda y, backend: layer(
        NETWORK.layers[1], layer(NETWORK.layers[0], y, backend=backend), backend=backend
    ),
}
each = pytest.mark.parametrize("run", ENTRIES.values(), ids=ENTRIES)
backends = pytest.mark.parametrize("backend", ["auto", "xla"])
LEADING = [(), (0,), (1,), (7,), (2, 3), (2, 0, 3), (2, 1, 2, 2)]


@each
@backends
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float32", "float64", "int8", "int16", "int32", "int64", "bool"]
)
def test_every_dtype(run: Any, backend: ops.Backend, dtype: str) -> None:
    """Sums are float32 whatever comes in, and so is the result: only the features are rounded."""
    y = (np.random.default_rng(0).normal(size=(5, 40)) * 3).astype(jnp.dtype(dtype))
    for container in (np.asarray, jnp.asarray, np.ndarray.tolist):
        result = run(container(y), backend)
        assert result.dtype == jnp.float32
        np.testing.assert_allclose(result, dense_reference(NETWORK, y.astype(np.float64)), atol=5e-5)


@each
@backends
@pytest.mark.parametrize("leading", LEADING)
def test_any_number_of_leading_axes(run: Any, backend: ops.Backend, leading: tuple[int, ...]) -> None:
    y = np.random.default_rng(0).normal(size=(*leading, 40)).astype(np.float32)
    result = run(y, backend)
    assert result.shape == (*leading, 20)
    np.testing.assert_allclose(result, dense_reference(NETWORK, y.reshape(-1, 40)).reshape(result.shape), atol=5e-5)


@backends
@pytest.mark.parametrize("leading", LEADING)
def test_categories_of_any_number_of_leading_axes(backend: ops.Backend, leading: tuple[int, ...]) -> None:
    y = np.random.default_rng(0).normal(size=(*leading, 40)).astype(np.float32)
    alive = categories(PLAN, y, backend=backend)
    np.testing.assert_array_equal(alive, np.asarray(infer(PLAN, y, backend=backend)).any(axis=-1))


@backends
@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_packed_features_with_leading_axes(backend: ops.Backend, leading: tuple[int, ...]) -> None:
    plain = np.random.default_rng(0).random((*leading, 40)) < 0.3
    result = infer(PLAN, pack_bits(plain), backend=backend)
    np.testing.assert_allclose(result, infer(PLAN, plain, backend=backend), rtol=1e-6)


@each
@backends
def test_vmap_over_nothing(run: Any, backend: ops.Backend) -> None:
    assert jax.vmap(lambda y: run(y, backend))(jnp.zeros((0, 3, 40))).shape == (0, 3, 20)
    assert jax.vmap(lambda y: run(y, backend))(jnp.zeros((0, 40))).shape == (0, 20)


@each
def test_the_derivative_is_of_the_dtype_that_came_in(run: Any) -> None:
    y = jnp.ones((2, 40), jnp.bfloat16)
    if run is ENTRIES["infer"]:
        plan = PLAN.with_derivatives()
        run = lambda y, backend: infer(plan, y, backend=backend)  # noqa: E731
    assert jax.grad(lambda y: run(y, "auto").sum())(y).dtype == jnp.bfloat16


@pytest.mark.parametrize("neurons", [1, 31, 32, 33, 100])
@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int64, np.float32])
def test_pack_bits(neurons: int, dtype: Any) -> None:
    plain = (np.random.default_rng(0).random((10, neurons)) < 0.5).astype(dtype)
    packed = pack_bits(plain)
    assert packed.shape == (10, -(-neurons // 32))
    assert packed.dtype == np.uint32
    for neuron in range(neurons):
        np.testing.assert_array_equal(packed[:, neuron // 32] >> neuron % 32 & 1, plain[:, neuron])
    np.testing.assert_array_equal(pack_bits(plain[3]), packed[3])
    np.testing.assert_array_equal(pack_bits(plain.reshape(2, 5, neurons)), packed.reshape(2, 5, -1))


@pytest.mark.parametrize("wrong", [[[0, 2]], [[0.5, 0]], [[-1, 0]], [[np.nan, 0]], np.array([[255]], np.uint8)])
def test_what_is_no_bit_is_not_packed(wrong: Any) -> None:
    with pytest.raises(ValueError, match="must be 0 or 1, got"):
        pack_bits(wrong)


@pytest.mark.parametrize("wrong", [None, "bits", 1, [[0], [0, 1]], [[1j]]])
def test_what_is_no_array_is_not_packed(wrong: Any) -> None:
    with pytest.raises(ValueError, match="features must"):
        pack_bits(wrong)
