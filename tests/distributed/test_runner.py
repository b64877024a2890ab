"""Runs cut into passes and pieces give what whole ones give."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from spdnn_jax import build_plan, ops
from spdnn_jax.distributed.mesh import AXIS
from spdnn_jax.distributed.runner import Runner, Settings
from tests.conftest import random_network

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.mark.parametrize("devices", [1, 3])
@pytest.mark.parametrize(
    ("settings", "passes", "streamed"),
    [
        (Settings(5, 150), 1, False),
        (Settings(5, 64), 3, False),
        (Settings(2, 150), 1, True),
        (Settings(1, 1), 150, True),
        (Settings(5, 150, rebalance_after=2, rebalance="always"), 1, False),
    ],
)
def test_however_it_is_cut(devices: int, settings: Settings, passes: int, streamed: bool) -> None:
    """The last pass and the last piece are shorter than the others, and passes come back in order."""
    plan = build_plan(random_network(5, [40, 50, 30, 30, 30, 9], bias="negative", density=0.2))
    y0 = np.random.default_rng(2).random((150, 40)) < 0.2
    mesh = Mesh(np.asarray(jax.devices("cpu")[:devices]), (AXIS,))
    runner = Runner(plan, mesh, len(y0), settings, "auto")
    assert (runner.passes, runner.streamed) == (passes, streamed)
    runner.place(y0)
    runner.compile()
    alive, active = runner.fetch(runner.run())
    expected_alive, expected_active = ops.categories_and_active(plan, y0)
    np.testing.assert_array_equal(alive, expected_alive)
    np.testing.assert_array_equal(active.sum(axis=0), expected_active)
    assert active.shape == (devices, plan.layers)
