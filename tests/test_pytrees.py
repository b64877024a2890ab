"""Layers, networks and plans as pytrees: JAX and its libraries rebuild them around whatever they like."""

import dataclasses
from collections.abc import Callable
from typing import Any

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import apply, build_plan, export_checks, infer, layer
from tests.conftest import dense_reference, random_network

NETWORK = random_network(0, [12, 10, 8])
PLAN = build_plan(NETWORK)
RUN: dict[str, tuple[Any, Callable[[Any, Any], jax.Array]]] = {
    "layer": (NETWORK.layers[0], layer),
    "layer with its transposed index": (NETWORK.layers[0].with_transposed(), layer),
    "network": (NETWORK, apply),
    "plan": (PLAN, infer),
    "plan for derivatives": (PLAN.with_derivatives(), infer),
}
each = pytest.mark.parametrize(("tree", "run"), RUN.values(), ids=RUN)


@pytest.fixture
def y() -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).random((6, 12), np.float32))


@each
@pytest.mark.parametrize(
    "leaf", [None, True, "a name", (1, 2), object()], ids=["None", "bool", "str", "tuple", "object"]
)
def test_leaves_may_become_anything(tree: Any, run: Any, leaf: Any) -> None:
    del run
    rebuilt = jax.tree.map(lambda _: leaf, tree)
    assert type(rebuilt) is type(tree)
    assert all(x is leaf for x in jax.tree.leaves(rebuilt, is_leaf=lambda x: x is leaf))


@each
def test_stacked_and_taken_apart_again(tree: Any, run: Any, y: jax.Array) -> None:
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), tree, tree)
    second = jax.tree.map(lambda leaf: leaf[1], stacked)
    np.testing.assert_array_equal(run(second, y), run(tree, y))


def test_stacked_networks_under_vmap(y: jax.Array) -> None:
    """An ensemble: one pattern, weights of each member."""
    values = [jax.tree.map(lambda leaf, k=k: leaf * k if leaf.dtype == np.float32 else leaf, NETWORK) for k in (1, 2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *values)
    got = jax.vmap(apply, in_axes=(0, None))(stacked, y)
    for member, one in zip(got, values, strict=True):
        np.testing.assert_allclose(member, apply(one, y), rtol=1e-5)


@each
@pytest.mark.parametrize("kind", [equinox.is_array, equinox.is_inexact_array])
def test_partitioned_and_combined(tree: Any, run: Any, kind: Any, y: jax.Array) -> None:
    again = equinox.combine(*equinox.partition(tree, kind))
    np.testing.assert_array_equal(run(again, y), run(tree, y))


@each
def test_trees_of_shardings(tree: Any, run: Any, y: jax.Array) -> None:
    everywhere = NamedSharding(Mesh(np.asarray(jax.devices()), ("x",)), P())
    shardings = jax.tree.map(lambda _: everywhere, tree)
    placed = jax.device_put(tree, shardings)
    result = jax.jit(run, in_shardings=(shardings, everywhere))(placed, jax.device_put(y, everywhere))
    np.testing.assert_array_equal(result, run(tree, y))


@each
def test_out_of_vmap_and_scan(tree: Any, run: Any, y: jax.Array) -> None:
    out = jax.vmap(lambda _: tree)(jnp.arange(3))
    _, ys = jax.lax.scan(lambda carry, _: (carry, tree), 0, jnp.arange(3))
    for stacked in (out, ys):
        np.testing.assert_array_equal(run(jax.tree.map(lambda leaf: leaf[2], stacked), y), run(tree, y))
    carried, _ = jax.lax.scan(lambda carry, _: (carry, None), tree, jnp.arange(3))
    np.testing.assert_array_equal(run(carried, y), run(tree, y))


@each
def test_shapes_alone(tree: Any, run: Any, y: jax.Array) -> None:
    assert jax.eval_shape(run, tree, y).shape == run(tree, y).shape


@each
def test_jacrev_of_the_whole_tree(tree: Any, run: Any, y: jax.Array) -> None:
    jacobian = jax.jacrev(run, allow_int=True)(tree, y)
    assert type(jacobian) is type(tree)
    result = run(tree, y)
    for leaf, of_leaf in zip(jax.tree.leaves(tree), jax.tree.leaves(jacobian), strict=True):
        assert of_leaf.shape == (*result.shape, *leaf.shape)
        assert leaf.dtype != np.float32 or np.asarray(of_leaf).any()


def test_jacrev_of_a_layer_is_right(y: jax.Array) -> None:
    one = NETWORK.layers[0]
    jacobian = jax.jacrev(lambda values: layer(dataclasses.replace(one, values=values), y))(one.values)
    row = np.repeat(np.arange(one.outputs), np.diff(one.indptr))
    active = (layer(one, y) > 0) & (layer(one, y) < 32)
    expected = np.asarray(active)[:, :, None] * (row == np.arange(10)[:, None]) * np.asarray(y)[:, None, one.indices]
    np.testing.assert_allclose(jacobian, expected, rtol=1e-6)


def test_builders_return_device_arrays() -> None:
    for one in NETWORK.layers:
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(one))
    assert isinstance(PLAN.words, jax.Array)


@each
def test_exported_functions_take_them_as_arguments(tree: Any, run: Any, y: jax.Array) -> None:
    exported = export.export(jax.jit(run), disabled_checks=export_checks)(tree, y)
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(tree, y), run(tree, y))


def test_an_exported_function_takes_another_network_of_the_same_shape(y: jax.Array) -> None:
    again = export.deserialize(export.export(jax.jit(apply), disabled_checks=export_checks)(NETWORK, y).serialize())
    other = jax.tree.map(lambda leaf: leaf * 0.5 if leaf.dtype == np.float32 else leaf, NETWORK)
    np.testing.assert_allclose(again.call(other, y), dense_reference(other, np.asarray(y)), atol=1e-5)
