"""The primitives' rules: jit, lowering, batching, derivatives, sharding, caching."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spdnn_jax import Plan, SparseLayer, build_plan, categories, infer, layer, ops
from spdnn_jax.graph_challenge import radixnet
from tests.conftest import dense_reference, random_network


@pytest.fixture
def plan() -> Plan:
    return build_plan(random_network(0, [12, 10, 8]))


@pytest.fixture
def y0() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((6, 12), np.float32))


def test_inside_jit_with_the_plan_as_argument(plan: Plan, y0: jax.Array) -> None:
    np.testing.assert_array_equal(jax.jit(lambda p, y: infer(p, y * 2))(plan, y0), infer(plan, y0 * 2))


def test_lowers_to_one_custom_call(plan: Plan, y0: jax.Array) -> None:
    text = infer.lower(plan, y0).as_text()
    assert text.count("spdnn_network") == 1
    assert "gather" not in text
    assert jax.jit(layer).lower(SparseLayer.from_dense(np.ones((12, 3))), y0).as_text().count("spdnn_layer") == 1


def test_other_platforms_get_plain_xla(plan: Plan, y0: jax.Array) -> None:
    text = infer.trace(plan, y0).lower(lowering_platforms=("tpu",)).as_text()
    assert "spdnn_network" not in text
    assert "gather" in text


def test_a_second_call_compiles_nothing(plan: Plan, y0: jax.Array) -> None:
    infer(plan, y0)
    jitted: Any = infer
    before = jitted._cache_size()
    infer(build_plan(random_network(0, [12, 10, 8])), y0 + 1)
    assert jitted._cache_size() == before


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_deep_networks_trace_to_small_programs(backend: ops.Backend) -> None:
    """A program that grew with the layers would take minutes to compile."""
    plan = build_plan(radixnet.layers(64, 1920))
    y0 = jnp.ones((4, 64), jnp.uint8)
    shallow = categories.lower(build_plan(radixnet.layers(64, 96)), y0, backend=backend).as_text()
    deep = categories.lower(plan, y0, backend=backend).as_text()
    assert deep.count("\n") == shallow.count("\n")


def test_vmap(plan: Plan, y0: jax.Array) -> None:
    batch = jnp.stack([y0, y0 * 0.5, y0 * 2], axis=1)
    for function in (infer, categories):
        got = jax.vmap(lambda y, f=function: f(plan, y), in_axes=1)(batch)
        for k in range(3):
            np.testing.assert_array_equal(got[k], function(plan, batch[:, k]))
    alive, active = jax.vmap(lambda y: ops.categories_and_active(plan, y), in_axes=1)(batch)
    np.testing.assert_array_equal(active[1], ops.categories_and_active(plan, batch[:, 1])[1])
    assert alive.shape == (3, 6)


def test_vmap_over_layers(y0: jax.Array) -> None:
    one = SparseLayer.from_dense(np.random.default_rng(0).normal(size=(12, 5)), 0.1)
    values = jnp.stack([jnp.asarray(one.values), jnp.asarray(one.values) * 2])
    got = jax.vmap(lambda v: layer(dataclasses.replace(one, values=v), y0))(values)
    np.testing.assert_allclose(got[1], layer(dataclasses.replace(one, values=values[1]), y0), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda y: layer(one, y))(jnp.stack([y0, -y0]))[1], layer(one, -y0), rtol=1e-6)


def test_derivative_in_the_features(plan: Plan, y0: jax.Array) -> None:
    network = random_network(0, [12, 10, 8])
    gradient = jax.grad(lambda y: (infer(plan, y) ** 2).sum())(y0)
    step = 1e-6 * np.random.default_rng(1).normal(size=y0.shape)
    y = np.asarray(y0, np.float64)
    difference = (dense_reference(network, y + step) ** 2).sum() - (dense_reference(network, y - step) ** 2).sum()
    np.testing.assert_allclose((np.asarray(gradient, np.float64) * step).sum(), difference / 2, rtol=1e-3)


def test_derivatives_of_a_layer(y0: jax.Array) -> None:
    one = SparseLayer.from_dense(np.random.default_rng(0).normal(size=(12, 5)), 0.1)
    dense = jnp.asarray(one.to_scipy().toarray())

    def ours(values: jax.Array, bias: jax.Array, y: jax.Array) -> jax.Array:
        return (layer(dataclasses.replace(one, values=values, bias=bias), y) ** 2).sum()

    def plain(matrix: jax.Array, bias: jax.Array, y: jax.Array) -> jax.Array:
        return (jnp.clip(y @ matrix + bias, 0, 32) ** 2).sum()

    values, bias, y = jax.grad(ours, (0, 1, 2))(jnp.asarray(one.values), jnp.float32(0.1), y0)
    matrix, plain_bias, plain_y = jax.grad(plain, (0, 1, 2))(dense, jnp.float32(0.1), y0)
    coordinates = one.to_scipy().tocoo()
    np.testing.assert_allclose(values, matrix[coordinates.row, coordinates.col], rtol=1e-4)
    np.testing.assert_allclose(bias, plain_bias, rtol=1e-4)
    np.testing.assert_allclose(y, plain_y, rtol=1e-4, atol=1e-5)


def test_input_of_other_types_has_no_derivative(plan: Plan) -> None:
    bits = jnp.ones((3, 12), jnp.uint8)
    _, tangent = jax.jvp(lambda s: infer(plan, bits) * s, (jnp.float32(2),), (jnp.float32(1),))
    np.testing.assert_array_equal(tangent, infer(plan, bits))
