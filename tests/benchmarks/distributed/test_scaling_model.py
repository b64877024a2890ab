"""The scaling model of benchmarks/distributed/scaling_model.py, on runs that were made up from known costs."""

from typing import Any

import numpy as np
import pytest

from benchmarks.distributed import scaling_model

LAYER, FEATURE = 5e-6, 2e-9


def run(features: int, active: list[int], **more: Any) -> dict[str, Any]:
    seconds = len(active) * LAYER + FEATURE * (features + sum(active[:-1]))
    return more | {"features": features, "active": active, "seconds": seconds}


def test_fit_finds_the_costs_again() -> None:
    """Costs that are swapped or wrongly scaled would still fit something, and predict nonsense."""
    model = scaling_model.fit([run(60000 // d, [3000 // d, 2000 // d, 2000 // d]) for d in (1, 4, 64)])
    assert (model.layer, model.feature) == pytest.approx((LAYER, FEATURE))
    assert model.error < 1e-6


def test_no_cost_is_negative() -> None:
    """Noise must not make a prediction fall below zero for few features."""
    runs = [run(1000, [1000, 1000]), run(10, [10, 10])]
    runs[1]["seconds"] = runs[0]["seconds"] / 1000
    model = scaling_model.fit(runs)
    assert model.layer == 0
    assert model.feature > 0
    with pytest.raises(ValueError, match="two shares at least"):
        scaling_model.fit(runs[:1])


def test_the_fullest_device_is_waited_for() -> None:
    model = scaling_model.Model(LAYER, FEATURE, 0.0)
    spread = {"features": 1000, "active": [400, 400], "devices": 2, "fullest_over_mean": [1.5, 1.0]}
    assert scaling_model.check(model, spread) == pytest.approx(2 * LAYER + FEATURE * (500 + 300))


def test_survivors_go_on_in_deeper_networks() -> None:
    before = scaling_model.features_before(100, [40, 20], 5)
    np.testing.assert_array_equal(before, [100, 40, 20, 20, 20])
    np.testing.assert_array_equal(scaling_model.features_before(100, [40, 20], 2), [100, 40])
