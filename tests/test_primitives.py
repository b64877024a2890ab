"""The primitives' rules: jit, lowering, batching, derivatives, sharding, caching."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spdnn_jax import Plan, SparseLayer, build_plan, categories, infer, layer, ops
from spdnn_jax.graph_challenge import radixnet
from tests.conftest import random_network


@pytest.fixture
def plan() -> Plan:
    return build_plan(random_network(0, [12, 10, 8]))


@pytest.fixture
def y0() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((6, 12), np.float32))


def test_inside_jit_with_the_plan_as_argument(plan: Plan, y0: jax.Array) -> None:
    np.testing.assert_array_equal(jax.jit(lambda p, y: infer(p, y * 2))(plan, y0), infer(plan, y0 * 2))


def test_lowers_to_one_custom_call(plan: Plan, y0: jax.Array) -> None:
    text = jax.jit(infer).lower(plan, y0).as_text()
    assert text.count("spdnn_network") == 1
    assert "gather" not in text
    assert jax.jit(layer).lower(SparseLayer.from_dense(np.ones((12, 3))), y0).as_text().count("spdnn_layer") == 1


@pytest.mark.parametrize(("features", "is_long"), [(8, False), (50000, True)])
def test_long_calls_are_dispatched(plan: Plan, features: int, is_long: bool, on_cpu: None) -> None:
    """XLA runs what has fewer than 1,000 operations on the caller's thread, and counts none of a custom call."""
    plan = plan.with_derivatives()
    y = jnp.ones((features, 12))
    for program in (infer, lambda plan, y: jax.vjp(lambda y: infer(plan, y), y)[0]):
        analysis: Any = jax.jit(program).lower(plan, y).compile().cost_analysis()
        assert (analysis.get("flops", 0) >= 1000) == is_long


def test_other_platforms_get_plain_xla(plan: Plan, y0: jax.Array) -> None:
    text = jax.jit(infer).trace(plan, y0).lower(lowering_platforms=("tpu",)).as_text()
    assert "spdnn_network" not in text
    assert "gather" in text


def test_a_second_call_compiles_nothing(plan: Plan, y0: jax.Array) -> None:
    infer(plan, y0)
    jitted: Any = ops._jitted_network
    before = jitted._cache_size()
    infer(build_plan(random_network(0, [12, 10, 8])), y0 + 1)
    assert jitted._cache_size() == before


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_deep_networks_trace_to_small_programs(backend: ops.Backend) -> None:
    """A program that grew with the layers would take minutes to compile."""
    plan = build_plan(radixnet.layers(64, 1920))
    y0 = jnp.ones((400, 64), jnp.uint8)
    run = jax.jit(functools.partial(categories, backend=backend))
    shallow = run.lower(build_plan(radixnet.layers(64, 96)), y0).as_text()
    deep = run.lower(plan, y0).as_text()
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
