"""What docs/numerics.md says: the error of a layer, close calls, and what becomes of numbers that are none."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, categories, infer, layer
from tests.conftest import random_layer

_UNIT = 2.0**-24
"""Half the distance from 1 to the next float32: the relative error of one rounding."""

Run = Callable[[SparseNetwork, np.ndarray], jax.Array]


def _plan(backend: Any) -> Run:
    return lambda network, y0: infer(build_plan(network), y0, backend=backend)


def _layers(backend: Any) -> Run:
    def run(network: SparseNetwork, y0: np.ndarray) -> jax.Array:
        pairs = zip(network.layers, network.activation, strict=True)
        return functools.reduce(lambda y, pair: layer(pair[0], y, activation=pair[1], backend=backend), pairs, y0)  # pyright: ignore[reportReturnType, reportArgumentType]

    return run


RUNS = pytest.mark.parametrize("run", [_plan("auto"), _plan("xla"), _layers("auto"), _layers("xla")])

pytestmark = pytest.mark.usefixtures("on_cpu")


def exact_and_bound(part: SparseLayer, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sums in float64, and how far a sum of float32 may lie from them: gamma(n + 1) (|y| |W| + |bias|), n edges."""
    weights = part.to_scipy().astype(np.float64)
    bias = np.asarray(part.bias, np.float64)
    steps = (np.diff(part.indptr) + 1) * _UNIT
    bound = steps / (1 - steps) * (np.abs(y) @ abs(weights) + np.abs(bias))
    return np.asarray(y @ weights + bias), np.asarray(bound)


@RUNS
@pytest.mark.parametrize("edges", [3, 40, 300])
def test_a_layer_is_as_exact_as_said(run: Run, edges: int) -> None:
    """Sums that cancel, too: what counts is the size of the summands, not that of their sum."""
    generator = np.random.default_rng(edges)
    part = random_layer(generator, edges, 64, density=1.0)
    y = generator.normal(size=(50, edges)).astype(np.float32)
    exact, bound = exact_and_bound(part, y)
    error = np.abs(np.asarray(run(SparseNetwork((part,), Clip.identity()), y), np.float64) - exact)
    assert (error <= bound).all()
    assert error.max() > 0
    assert error.max() > bound.max() / 1000, "a bound that says something"


def test_a_category_differs_only_in_a_close_call() -> None:
    """Outputs that sum up to nearly nothing: some categories differ from float64's, all of them within the bound."""
    generator = np.random.default_rng(0)
    y = generator.normal(size=(4000, 100)).astype(np.float32)
    half = generator.normal(size=(50, 1))
    part = SparseLayer.from_dense(np.concatenate([half, -half]))
    y[:, 50:] = y[:, :50]
    y[:, 50] += np.float32(1e-6) * generator.normal(size=4000).astype(np.float32)
    exact, bound = exact_and_bound(part, y)
    found = np.asarray(categories(build_plan(SparseNetwork((part,), Clip.relu())), y))
    differs = found != (exact > 0).any(axis=1)
    close = (np.abs(exact) <= bound).any(axis=1)
    assert differs.any()
    assert not (differs & ~close).any()


@RUNS
@pytest.mark.parametrize("clip", [Clip.relu(32), Clip.relu(), Clip(-1, 1), Clip.identity()])
def test_a_sum_that_is_no_number_becomes_the_lower_bound(run: Run, clip: Clip) -> None:
    """The outputs that read it; other outputs and other features stay as they are."""
    part = SparseLayer.from_dense(np.array([[1, 1, 0], [0, 2, 0.5]]))
    y = np.full((70, 2), 0.25, np.float32)
    plain = np.array(run(SparseNetwork((part,), clip), y))
    y[33, 0] = np.nan
    plain[33, :2] = max(clip.lower, -np.finfo(np.float32).max)
    np.testing.assert_array_equal(run(SparseNetwork((part,), clip), y), plain)


@RUNS
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("clip", [Clip.relu(32), Clip(-1, 1)])
def test_an_infinite_feature_gives_a_bound(run: Run, clip: Clip, sign: int) -> None:
    """Where it is read; other outputs and other features stay as they are."""
    part = SparseLayer.from_dense(np.array([[1, 1, 0], [0, 2, 0.5]]))
    y = np.full((70, 2), 0.25, np.float32)
    plain = np.array(run(SparseNetwork((part,), clip), y))
    y[33, 0] = sign * np.inf
    found = np.array(run(SparseNetwork((part,), clip), y))
    assert set(found[33, :2].tolist()) <= {clip.lower, clip.upper}
    found[33, :2] = plain[33, :2]
    np.testing.assert_array_equal(found, plain)


@RUNS
@pytest.mark.parametrize("sign", [1, -1])
def test_an_overflow_stays_finite(run: Run, sign: int) -> None:
    """Once an infinite activation met an edge of weight 0, which pads a row, and became NaN in `infer` alone."""
    part = SparseLayer.from_dense(np.full((3, 3), 3e38 * sign))
    network = SparseNetwork((part,) * 3, Clip.identity())
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(run(network, np.ones((5, 3), np.float32)), np.full((5, 3), sign * largest))


@RUNS
def test_negative_and_tiny_numbers_below_zero_are_plain_zero(run: Run) -> None:
    """-0.0 is no sign of life: its bits are not those of zero."""
    network = SparseNetwork((SparseLayer.from_dense(np.ones((1, 1))),), Clip.relu())
    result = np.asarray(run(network, np.array([[-0.0], [-1e-40], [-1e-30], [0.0]], np.float32)))
    np.testing.assert_array_equal(result.view(np.uint32), 0)


@RUNS
def test_the_largest_numbers_pass(run: Run) -> None:
    largest = np.finfo(np.float32).max
    network = SparseNetwork((SparseLayer.from_dense(np.ones((1, 1))),), Clip.identity())
    y = np.array([[largest], [-largest], [np.finfo(np.float32).tiny]], np.float32)
    np.testing.assert_array_equal(run(network, y), y)


@pytest.mark.parametrize("cap", [1e-50, 1e50])
def test_caps_that_float32_does_not_hold_are_refused(cap: float) -> None:
    """The smaller one made everything zero."""
    with pytest.raises(ValueError, match="cap must be"):
        Clip.relu(cap)


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "features"), [*itertools.product([1, 31, 65535, 65536, 65537], [0, 1]), (1_000_000, 1)]
)
def test_widths_at_which_something_changes(width: int, features: int) -> None:
    """16-bit indices end at 65,536; packed words at 32."""
    generator = np.random.default_rng(width)
    reads = generator.integers(width, size=width)
    indptr = np.arange(width + 1)
    part = SparseLayer(indptr, reads.astype(np.int32), np.float32(0.5), np.float32(0.25), width).validate()  # pyright: ignore[reportArgumentType]
    y0 = generator.random((features, width), np.float32)
    network = SparseNetwork((part, part), Clip.relu())
    once = y0[:, reads] * np.float32(0.5) + np.float32(0.25)
    np.testing.assert_array_equal(infer(build_plan(network), y0), once[:, reads] * np.float32(0.5) + np.float32(0.25))


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_a_network_without_edges_gives_its_bias(backend: Any) -> None:
    network = SparseNetwork((SparseLayer.from_dense(np.zeros((5, 4)), np.arange(4)),), Clip.relu(2))
    result = infer(build_plan(network), np.ones((3, 5), np.float32), backend=backend)
    np.testing.assert_array_equal(result, np.broadcast_to([0, 1, 2, 2], (3, 4)))


def test_ten_thousand_layers() -> None:
    """One plan for both back ends: laying it out is what takes long. Of 10,003, for the result to be turned."""
    part = SparseLayer.from_dense(np.roll(np.eye(5), 1, axis=1))
    plan = build_plan([part] * 10_003, activation=Clip.relu())
    y0 = np.random.default_rng(0).random((3, 5), np.float32)
    for backend in ("auto", "xla"):
        result = infer(plan, y0, backend=backend)
        np.testing.assert_array_equal(result, np.roll(y0, 10_003 % 5, axis=1), err_msg=backend)
