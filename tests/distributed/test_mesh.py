"""Features spread over a mesh: equal to one device, no needless communication, under jit, scan and pmap."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import _native, build_plan, categories, categories_sharded, feature_mesh, infer, infer_sharded, ops
from spdnn_jax.distributed.mesh import (
    AXIS,
    _spread,
    categories_and_active_dealt,
    collect,
    deal_out,
    imbalance,
    place,
    replicate,
)
from spdnn_jax.plan import Plan
from tests.conftest import random_network

_COLLECTIVE = re.compile(r"all-\w+|collective-\w+|reduce-scatter")

pytestmark = pytest.mark.usefixtures("on_cpu")


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.devices("cpu")[:devices]), (AXIS,))


def example(features: int, bias: str = "negative", dtype: type = np.float32) -> tuple[Plan, np.ndarray]:
    """A network without any regularity, and features of which the first third alone is alive: runs would be uneven."""
    plan = build_plan(random_network(5, [40, 30, 30, 12], bias=bias))
    y0 = np.random.default_rng(1).random((features, 40)) < 0.5
    y0[features // 3 :] = False
    return plan, y0.astype(dtype)


@pytest.mark.parametrize("bias", ["vector", "scalar", "negative"])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
@pytest.mark.parametrize("features", [0, 1, 7, 32, 144, 149])
def test_equals_one_device(features: int, devices: int, bias: str) -> None:
    """Padding, dealing and cutting must neither lose nor reorder features; with positive bias padded ones wake up."""
    plan, y0 = example(features, bias)
    mesh = mesh_of(devices)
    np.testing.assert_array_equal(infer_sharded(plan, y0, mesh), infer(plan, y0))
    np.testing.assert_array_equal(categories_sharded(plan, jnp.asarray(y0), mesh), categories(plan, y0))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("axes", [{"features": 4}, {"features": 2, "model": 2}])
@pytest.mark.parametrize("features", [7, 32, 150])
def test_any_mesh_and_any_array(axes: dict[str, int], kind: AxisType, features: int) -> None:
    """JAX makes explicit meshes by default, which refuse slices and gathers that do not say where results lie."""
    plan, y0 = example(features, "vector")
    mesh = jax.make_mesh(
        tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=jax.devices("cpu")[:4]
    )
    plan, expected = replicate(plan.with_derivatives(), mesh), infer(plan, y0)
    forms: list[Any] = [y0, jnp.asarray(y0), jax.device_put(y0, NamedSharding(mesh, P()))]
    if features % 4 == 0:
        forms.append(jax.device_put(y0, NamedSharding(mesh, P(tuple(axes)[-1]))))
    for form in forms:
        np.testing.assert_array_equal(infer_sharded(plan, form, mesh), expected)
        traced = jax.jit(lambda plan, y: infer_sharded(plan, y, mesh))(plan, form)
        np.testing.assert_array_equal(traced, expected)
        assert traced.sharding.is_fully_replicated == (features % mesh.shape["features"] != 0)
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda y: (infer_sharded(plan, y, mesh) ** 2).sum())(forms[-1])
    one = jax.grad(lambda y: (infer(example(features, "vector")[0].with_derivatives(), y) ** 2).sum())(jnp.asarray(y0))
    np.testing.assert_allclose(gradient, one, atol=1e-5)


@pytest.mark.parametrize("bias", ["vector", "scalar", "negative"])
@pytest.mark.parametrize("features", [1, 32, 149])
def test_placed_features_equal_one_device(features: int, bias: str) -> None:
    """Counts of active features must not hold the padding, whatever becomes of a feature that is all zero."""
    plan, y0 = example(features, bias)
    mesh = mesh_of(4)
    dealt = place(y0, features, mesh)
    replica = replicate(plan, mesh)
    alive, active = categories_and_active_dealt(replica, dealt, features=features, mesh=mesh)
    expected_alive, expected_active = ops.categories_and_active(plan, y0)
    np.testing.assert_array_equal(collect(alive, features, mesh), expected_alive)
    np.testing.assert_array_equal(np.asarray(active).sum(axis=0), expected_active)
    assert active.shape == (4, plan.layers)


def test_survivors_spread() -> None:
    """Dealt in runs, all survivors of this input would lie on the first two devices."""
    plan, y0 = example(1200)
    mesh = mesh_of(4)
    dealt = place(y0, len(y0), mesh)
    _, active = categories_and_active_dealt(plan, dealt, features=len(y0), mesh=mesh)
    assert imbalance(np.asarray(active)[:, 0]) < 1.1

    def count(y: jax.Array) -> jax.Array:
        return jnp.any(deal_out(y, 4) != 0, axis=1).sum()[None]

    counts = jax.shard_map(count, mesh=mesh, in_specs=P("features"), out_specs=P("features"))(jnp.asarray(y0))
    assert np.asarray(counts).tolist() == [100] * 4


@pytest.mark.parametrize("function", [infer_sharded, categories_sharded])
@pytest.mark.parametrize("features", [32, 144, 148])
@pytest.mark.parametrize("sharded", [True, False])
def test_nothing_is_gathered(function: Callable[..., jax.Array], features: int, sharded: bool) -> None:
    """XLA gathers silently what it is not told to leave in place: each device would hold all features."""
    plan, y0 = example(features)
    mesh = mesh_of(4)
    plan = replicate(plan, mesh)
    argument: Any = jax.device_put(y0, NamedSharding(mesh, P("features"))) if sharded else y0
    compiled = jax.jit(lambda plan, y: function(plan, y, mesh)).lower(plan, argument).compile()
    assert set(_COLLECTIVE.findall(str(compiled.as_text()))) == ({"all-to"} if features >= 8 * 16 else set())
    assert compiled.input_shardings[0][1].spec == P("features")
    assert compiled.output_shardings.spec == P("features")


def test_placed_features_need_no_communication() -> None:
    plan, y0 = example(149)
    mesh = mesh_of(4)
    arguments = replicate(plan, mesh), place(y0, 149, mesh)
    text = categories_and_active_dealt.lower(*arguments, features=149, mesh=mesh).compile().as_text()
    assert not _COLLECTIVE.findall(str(text))


@pytest.mark.skipif(not _native.has_cuda_library(), reason="the CUDA back end was not built")
def test_lowers_for_gpus() -> None:
    """Each device's custom call must see its own rows and a workspace for them, not for all features."""
    plan, y0 = example(320)
    mesh = mesh_of(4)
    traced = jax.jit(lambda plan, y: infer_sharded(plan, y, mesh)).trace(replicate(plan, mesh), y0)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    call = next(line for line in text.splitlines() if "spdnn_network" in line)
    assert "tensor<80x40xf32>" in call
    assert f"tensor<{_native.cuda_workspace_bytes(plan.table.records, 80)}xui8>" in call


def test_inside_jit_and_scan() -> None:
    """A bare abstract value loses what varies over the mesh, and the loop's carry no longer fits itself."""
    plan = build_plan(random_network(5, [40, 30, 40], bias="negative"))
    y0 = np.random.default_rng(1).random((150, 40), np.float32)
    mesh = mesh_of(4)

    def repeat(step: Callable[[jax.Array], jax.Array], y: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda y, _: (step(y), None), y, length=3)[0]

    expected = repeat(lambda y: infer(plan, y), jnp.asarray(y0))
    outside = jax.jit(lambda plan, y: repeat(lambda y: infer_sharded(plan, y, mesh), y))
    inside = jax.jit(
        jax.shard_map(
            lambda plan, y: repeat(lambda y: infer(plan, y), y),
            mesh=mesh, in_specs=(P(), P("features")), out_specs=P("features"), check_vma=True,
        )
    )  # fmt: skip
    np.testing.assert_array_equal(outside(plan, y0), expected)
    np.testing.assert_array_equal(inside(plan, y0[:148]), expected[:148])


def test_a_second_call_compiles_nothing() -> None:
    plan, y0 = example(64)
    mesh = mesh_of(2)
    infer_sharded(plan, y0, mesh)
    before = _spread._cache_size()  # pyright: ignore[reportAttributeAccessIssue]
    infer_sharded(plan, 1 - y0, mesh)
    assert before == _spread._cache_size()  # pyright: ignore[reportAttributeAccessIssue]


def test_under_pmap() -> None:
    """Programs that still use jax.pmap keep working (docs/pmap.md says how to leave it)."""
    plan, y0 = example(100)
    devices = jax.devices("cpu")[:4]
    got = jax.pmap(infer, in_axes=(None, 0), devices=devices)(plan, y0.reshape(4, 25, 40))
    np.testing.assert_array_equal(np.asarray(got).reshape(100, -1), infer(plan, y0))


def test_mistakes_are_named() -> None:
    plan, y0 = example(8)
    with pytest.raises(ValueError, match="none called 'features'"):
        infer_sharded(plan, y0, Mesh(np.asarray(jax.devices("cpu")[:2]), ("x",)))
    with pytest.raises(ValueError, match=r"shape \(features, 40\)"):
        infer_sharded(plan, y0[:, :39], mesh_of(2))
    with pytest.raises(ValueError, match="100 devices were asked for"):
        feature_mesh(100)


def test_eight_devices_of_a_fresh_process() -> None:
    """As a person starts it: the default mesh holds all devices."""
    program = """
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from spdnn_jax import _native, build_plan, categories, categories_sharded, feature_mesh
from spdnn_jax.graph_challenge import inputs, radixnet
plan, y0, mesh = build_plan(radixnet.layers(64, 9)), inputs.random(64, 1003, 0.3), feature_mesh()
np.testing.assert_array_equal(categories_sharded(plan, y0, mesh), categories(plan, y0))
print("agreed on", mesh.size)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},  # where there is a GPU, it would be the only device of the mesh
    )
    assert done.stdout == "agreed on 8\n", done.stderr
