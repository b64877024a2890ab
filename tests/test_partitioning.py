"""Under `jit` features stay where they lie, on meshes of either kind: no device sees another's."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import apply, build_plan, categories, infer, layer, ops
from tests.conftest import random_network

_COLLECTIVE = re.compile(r"all-\w+|collective-\w+|reduce-scatter")

pytestmark = pytest.mark.usefixtures("on_cpu")

NETWORK = random_network(5, [16, 12, 8], 1.5, bias="negative")
PLAN = build_plan(NETWORK, derivatives=True)


def mesh_of(kind: AxisType) -> Mesh:
    return jax.make_mesh((2, 2), ("features", "other"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])


def of_values(network: Any, y: jax.Array) -> jax.Array:
    gradient = jax.grad(lambda network: (apply(network, y) ** 2).sum(), allow_int=True)(network)
    return gradient.layers[0].values


PROGRAMS: dict[str, tuple[Any, Any]] = {
    "infer": (PLAN, infer),
    "categories": (PLAN, categories),
    "layer": (NETWORK.layers[0], layer),
    "apply": (NETWORK, apply),
    "vmap": (PLAN, lambda plan, y: jax.vmap(lambda s: infer(plan, y * s))(jnp.arange(3.0)).swapaxes(0, 1)),
    "vmap of rows": (PLAN, lambda plan, y: jax.vmap(lambda row: infer(plan, row[None])[0])(y)),
    "grad": (PLAN, lambda plan, y: jax.grad(lambda y: (infer(plan, y) ** 2).sum())(y)),
    "grad of apply": (NETWORK, lambda network, y: jax.grad(lambda y: (apply(network, y) ** 2).sum())(y)),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", PROGRAMS)
def test_features_stay_where_they_lie(name: str, kind: AxisType) -> None:
    """Plain `jit` gathers the argument of a custom call that has no partitioning rule, silently."""
    weights, program = PROGRAMS[name]
    y = np.random.default_rng(0).random((8, 16), np.float32)
    sharded = jax.device_put(y, NamedSharding(mesh_of(kind), P(("features", "other"))))
    compiled = jax.jit(program).lower(weights, sharded).compile()
    assert not _COLLECTIVE.findall(str(compiled.as_text()))
    got = jax.jit(program)(weights, sharded)
    assert got.sharding.spec[0] == ("features", "other")
    np.testing.assert_allclose(got, program(weights, jnp.asarray(y)), atol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sums_over_features_are_added_up(kind: AxisType) -> None:
    """The gradient of weights, and the counts of active features, need one all-reduce and no gather."""
    y = np.random.default_rng(0).random((8, 16), np.float32)
    sharded = jax.device_put(y, NamedSharding(mesh_of(kind), P("features")))
    for weights, program in ((NETWORK, of_values), (PLAN, lambda plan, y: ops.categories_and_active(plan, y)[1])):
        compiled = jax.jit(program).lower(weights, sharded).compile()
        assert set(_COLLECTIVE.findall(str(compiled.as_text()))) == {"all-reduce"}
        np.testing.assert_allclose(jax.jit(program)(weights, sharded), program(weights, jnp.asarray(y)), rtol=1e-5)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_neurons_are_refused(kind: AxisType) -> None:
    sharded = jax.device_put(np.ones((8, 16), np.float32), NamedSharding(mesh_of(kind), P(None, "features")))
    for call in (
        lambda: infer(PLAN, sharded),
        lambda: apply(NETWORK, sharded),
        lambda: layer(NETWORK.layers[0], sharded),
    ):
        with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="every device needs whole features"):
            jax.block_until_ready(call())
