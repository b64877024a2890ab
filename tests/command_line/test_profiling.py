"""Times by layer: what is in work in each, and who runs it."""

import numpy as np
import pytest

from spdnn_jax import build_plan, ops, planner
from spdnn_jax.command_line import profiling
from spdnn_jax.graph_challenge import inputs, radixnet
from tests.conftest import random_network


@pytest.mark.parametrize("backend", ["cpu", "xla"])
def test_features_in_work_are_those_of_the_whole_run(backend: str) -> None:
    plan = build_plan(radixnet.layers(64, 14))
    y0 = inputs.random(64, 100, density=0.2)
    _, active = ops.categories_and_active(plan, y0)
    done: list[int] = []
    profiles = profiling.profile_layers(plan, y0, backend=backend, progress=done.append)
    assert 0 < active[-1] < 100, "some die, some do not"
    assert [layer.features for layer in profiles] == [100, *np.asarray(active)[:-1].tolist()]
    assert {layer.kernel for layer in profiles} == {backend}
    for layer in profiles:
        assert layer.active_edges_per_second == pytest.approx(layer.features * 64 * 32 / layer.seconds)
    assert done == list(range(1, 15))


def test_nothing_is_dropped_where_a_bias_brings_it_back() -> None:
    plan = build_plan(random_network(0, [30, 30, 30, 30], bias="scalar"))
    profiles = profiling.profile_layers(plan, np.zeros((8, 30), np.float32), backend="cpu")
    assert [layer.features for layer in profiles] == [8, 8, 8]


def test_a_network_that_kills_all_features_takes_no_time() -> None:
    plan = build_plan(random_network(0, [30, 30, 30], bias="negative"))
    profiles = profiling.profile_layers(plan, np.zeros((8, 30), np.uint8), backend="cpu")
    assert (profiles[1].features, profiles[1].seconds, profiles[1].active_edges_per_second) == (0, 0.0, 0.0)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", [kernel for kernel in planner.KERNELS if kernel != "auto"])
def test_families_are_named(family: planner.Kernel) -> None:
    plan = build_plan(radixnet.layers(64, 6), kernel=family)
    profiles = profiling.profile_layers(plan, inputs.random(64, 100), backend="cuda")
    assert {layer.kernel for layer in profiles} == {family}
