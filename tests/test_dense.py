"""Layers as dense products: which, by a rule; and right beside the kernels, whatever is asked of a plan."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import (
    Clip,
    Plan,
    SparseLayer,
    SparseNetwork,
    build_plan,
    categories,
    costs,
    export_checks,
    infer,
    infer_sharded,
    ops,
    pack_bits,
    replicate,
)
from spdnn_jax.graph_challenge import oracle
from tests.conftest import dense_reference, random_layer, random_network

WIDTHS = [33, 40, 17, 25, 9]
ROUNDING = {"float32": 0.0, "tf32": 2.0**-10, "bfloat16": 2.0**-8}
"""How far an input of a product may be moved, relative to it (docs/numerics.md)."""


@pytest.fixture(autouse=True)
def _machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine without a GPU, but for tests that ask for one."""
    if "cuda" in request.fixturenames:
        yield
        return
    monkeypatch.setattr("spdnn_jax.plan.cuda_unavailable_reason", lambda: "nobody looks for one")
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Lets dense products win in every layer that has so many inputs and outputs, whatever they cost."""
    monkeypatch.setattr(costs, "GAIN", 0.0)
    for cost in (costs.CALL, costs.COPIED):
        monkeypatch.setitem(cost, "cpu", 0.0)
        monkeypatch.setitem(cost, "gpu", 0.0)

    def from_width(neurons: int) -> None:
        monkeypatch.setattr(costs, "NARROWEST", neurons)
        costs.chosen.cache_clear()

    from_width(1)
    yield from_width
    costs.chosen.cache_clear()


def features(count: int = 13, inputs: int = WIDTHS[0]) -> np.ndarray:
    return np.random.default_rng(count).normal(size=(count, inputs)).astype(np.float32)


def chosen(plan: Plan, count: int = 13) -> tuple[int, ...]:
    assert plan.dense is not None
    return plan.dense.chosen(plan.table, count)


# --- results ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("neurons", "layers"), [(1, (0, 1, 2, 3)), (10, (0, 1, 2)), (20, (0,)), (30, (0,))])
@pytest.mark.parametrize("activation", [Clip.relu(32), Clip.relu(), Clip(-1, 0.5), Clip.identity()])
@pytest.mark.parametrize("compress", ["none", "neurons", "full"])
def test_equals_the_oracle(
    dense: Callable[[int], None], neurons: int, layers: tuple[int, ...], activation: Clip, compress: Any
) -> None:
    dense(neurons)
    network = random_network(1, WIDTHS, activation=activation)
    plan = build_plan(network, compress=compress)
    y0 = features()
    assert chosen(plan) == layers
    expected = oracle.infer(network, y0)
    y, alive, active = ops.activations_and_active(plan, y0)
    np.testing.assert_allclose(y, expected.activations, atol=2e-5 * max(1, np.abs(expected.activations).max()))
    np.testing.assert_array_equal(alive, expected.categories)
    np.testing.assert_array_equal(active, expected.active)
    np.testing.assert_array_equal(categories(plan, y0), alive)
    np.testing.assert_array_equal(infer(plan, y0), y)


def test_dense_layers_in_the_middle_and_at_the_end(dense: Callable[[int], None]) -> None:
    """Parts of the kernels before and behind; equal neurons, of which the last layer restores all."""
    dense(30)
    generator = np.random.default_rng(0)
    layers = [random_layer(generator, a, b) for a, b in itertools.pairwise([20, 50, 41, 25, 60, 70])]
    twice = layers[-1].to_scipy().toarray()[:, np.arange(70) // 2]
    layers[-1] = SparseLayer.from_dense(twice, np.asarray(layers[-1].bias)[np.arange(70) // 2])
    network = SparseNetwork(layers, [Clip.relu(4), Clip(-2, 2), Clip.relu(), Clip.relu(8), Clip.identity()])
    y0 = features(31, 20)
    for compress in ("none", "neurons"):
        plan = build_plan(network, compress=compress)
        assert chosen(plan) == (1, 4)
        np.testing.assert_allclose(infer(plan, y0), dense_reference(network, y0), atol=1e-4)


def errors_and_bounds(precision: Any, edges: int) -> tuple[np.ndarray, np.ndarray]:
    """How far a layer's sums lie from those of float64, and how far they may."""
    part = random_layer(np.random.default_rng(edges), edges, 64, density=0.5)
    y = np.random.default_rng(1).normal(size=(50, edges)).astype(np.float32)
    plan = build_plan(SparseNetwork((part,), Clip.identity()), precision=precision)
    assert chosen(plan) == (0,)
    weights, bias = part.to_scipy().toarray().astype(np.float64), np.asarray(part.bias, np.float64)
    sizes = np.abs(y) @ np.abs(weights)
    moved = (1 + ROUNDING[precision]) ** 2
    steps = 2 * (np.diff(part.indptr) + 1) * 2.0**-24
    bound = (moved - 1) * sizes + steps / (1 - steps) * (moved * sizes + np.abs(bias))
    return np.abs(np.asarray(infer(plan, y), np.float64) - (y @ weights + bias)), bound


@pytest.mark.parametrize("edges", [3, 40, 300])
@pytest.mark.parametrize("precision", costs.PRECISIONS)
def test_a_layer_is_as_exact_as_said(dense: Callable[[int], None], with_gpu: None, precision: Any, edges: int) -> None:
    """As on a GPU, computed on the CPU, which rounds to bfloat16 and not to TF32."""
    error, bound = errors_and_bounds(precision, edges)
    assert (error <= bound).all()
    if precision == "bfloat16":
        assert error.max() > bound.max() / 100, "a bound that says something"


@pytest.mark.parametrize("edges", [3, 40, 300])
@pytest.mark.parametrize("precision", costs.PRECISIONS)
def test_a_gpu_is_as_exact_as_said(dense: Callable[[int], None], cuda: None, precision: Any, edges: int) -> None:
    """With kernels before and behind, too."""
    error, bound = errors_and_bounds(precision, edges)
    assert (error <= bound).all()
    assert precision == "float32" or error.max() > bound.max() / 1000, "something was rounded"
    dense(20)
    network, y0 = random_network(5, [33, 40, 17, 25, 30], 4.0), features()
    y, alive, active = ops.activations_and_active(build_plan(network, precision=precision), y0)
    expected = oracle.infer(network, y0)
    np.testing.assert_allclose(y, expected.activations, atol={"float32": 2e-5, "tf32": 0.1, "bfloat16": 0.8}[precision])
    if precision == "float32":
        np.testing.assert_array_equal(alive, expected.categories)
        np.testing.assert_array_equal(active, expected.active)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_a_cpu_computes_in_float32(dense: Callable[[int], None], precision: Any) -> None:
    network, y0 = random_network(2, WIDTHS), features()
    plan = build_plan(network, precision=precision)
    np.testing.assert_array_equal(infer(plan, y0), infer(build_plan(network), y0))
    assert f"{precision}, here float32" in plan.summary()


@pytest.mark.parametrize("shape", [(33,), (0, 33), (1, 33), (2, 3, 33), (2, 0, 33)])
@pytest.mark.parametrize("neurons", [1, 20])
def test_any_leading_axes(dense: Callable[[int], None], neurons: int, shape: tuple[int, ...]) -> None:
    dense(neurons)
    network = random_network(3, WIDTHS)
    plan, y0 = build_plan(network), np.random.default_rng(0).random(shape, np.float32)
    y, alive, active = ops.activations_and_active(plan, y0)
    expected = dense_reference(network, y0.reshape(-1, 33)).reshape(*shape[:-1], 9)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    assert (alive.shape, active.shape) == (shape[:-1], (4,))


@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 33)])
def test_bytes_bits_and_booleans(dense: Callable[[int], None], shape: tuple[int, ...]) -> None:
    plan = build_plan(random_network(4, WIDTHS))
    y0 = np.random.default_rng(0).random(shape) < 0.4
    expected = infer(plan, y0.astype(np.float32))
    for form in (y0, y0.astype(np.uint8), pack_bits(y0)):
        np.testing.assert_allclose(infer(plan, form), expected, rtol=1e-5)


@pytest.mark.parametrize("precision", costs.PRECISIONS)
def test_numbers_that_are_none(dense: Callable[[int], None], with_gpu: None, precision: Any) -> None:
    """NaN takes a whole feature, an infinite one and the largest number take only what reads them."""
    part = SparseLayer.from_dense(np.array([[1, 1, 0], [0, 2, 0.5]]))
    plan = build_plan(SparseNetwork((part, SparseLayer.from_dense(np.eye(3))), Clip(-1, 2)), precision=precision)
    y = np.full((6, 2), 0.25, np.float32)
    y[1:4, 0] = [np.nan, np.inf, np.finfo(np.float32).max]
    y[4, 0] = -np.inf
    plain, high, low = [0.25, 0.75, 0.125], [2, 2, 0.125], [-1, -1, 0.125]
    np.testing.assert_array_equal(infer(plan, y), [plain, [-1, -1, -1], high, high, low, plain])
    overflow = SparseNetwork((SparseLayer.from_dense(np.full((3, 3), 3e38)),) * 3, Clip.identity())
    found = infer(build_plan(overflow, precision=precision), np.ones((5, 3), np.float32))
    np.testing.assert_array_equal(found, np.full((5, 3), np.finfo(np.float32).max))


# --- JAX --------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=[1, 20, 30])
def plan_and_network(request: pytest.FixtureRequest, dense: Callable[[int], None]) -> tuple[Plan, SparseNetwork]:
    dense(request.param)
    network = random_network(5, WIDTHS, 4.0)
    return build_plan(network, derivatives=True), network


def test_under_jit_vmap_scan_and_export(plan_and_network: tuple[Plan, SparseNetwork]) -> None:
    plan, network = plan_and_network
    y0 = features(6)
    expected = dense_reference(network, y0)
    run = jax.jit(infer)
    mapped = jax.vmap(lambda y: infer(plan, y))(jnp.asarray(y0).reshape(2, 3, 33))
    of_plans = jax.vmap(infer, (0, None))(jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), plan), y0)
    _, scanned = jax.lax.scan(lambda carry, y: (carry, infer(plan, y)), 0, jnp.asarray(y0))
    # JAX would export for the machine's GPU, whatever the default device is
    exported = export.export(run, platforms=["cpu"], disabled_checks=export_checks)(plan, y0)
    for found in (
        run(plan, y0),
        mapped.reshape(6, 9),
        of_plans[1],
        scanned,
        export.deserialize(exported.serialize()).call(plan, y0),
    ):
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_counts_under_vmap(plan_and_network: tuple[Plan, SparseNetwork]) -> None:
    plan, _ = plan_and_network
    y0 = features(6).reshape(2, 3, 33)
    mapped = jax.vmap(lambda y: ops.categories_and_active(plan, y)[1])(y0)
    np.testing.assert_array_equal(mapped, [ops.categories_and_active(plan, y)[1] for y in y0])


def test_derivatives_are_those_of_the_kernels(plan_and_network: tuple[Plan, SparseNetwork]) -> None:
    plan, _ = plan_and_network
    y0, direction = jnp.asarray(features(6)), jnp.asarray(features(6) * 2)
    kernels = dataclasses.replace(plan, dense=None)
    programs: list[Callable[[Plan], Any]] = [
        lambda plan: jax.grad(lambda y: (infer(plan, y) ** 2).sum())(y0),
        lambda plan: jax.jvp(lambda y: infer(plan, y), (y0,), (direction,)),
        lambda plan: jax.vmap(jax.grad(lambda y: infer(plan, y[None]).sum()))(y0),
        lambda plan: jax.grad(lambda y: (jax.grad(lambda y: (infer(plan, y) ** 3).sum())(y) ** 2).sum())(y0),
        lambda plan: jax.jvp(lambda y: ops.activations_and_active(plan, y)[0], (y0,), (direction,)),
    ]
    for program in programs:
        jax.tree.map(np.testing.assert_array_equal, jax.jit(program)(plan), jax.jit(program)(kernels))


def test_weights_are_constants(plan_and_network: tuple[Plan, SparseNetwork]) -> None:
    plan, _ = plan_and_network
    gradient = jax.grad(lambda plan: infer(plan, features()).sum(), allow_int=True)(plan)
    assert not any(np.asarray(leaf).any() for leaf in gradient.dense.weights + gradient.dense.biases)
    np.testing.assert_array_equal(jax.jit(lambda y: infer(jax.lax.stop_gradient(plan), y))(features()).shape, (13, 9))


def test_without_what_derivatives_read(dense: Callable[[int], None]) -> None:
    plan = build_plan(random_network(5, WIDTHS))
    with pytest.raises(ValueError, match="derivatives=True"):
        jax.grad(lambda y: infer(plan, y).sum())(jnp.asarray(features()))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_features_stay_where_they_lie(plan_and_network: tuple[Plan, SparseNetwork], kind: AxisType) -> None:
    plan, network = plan_and_network
    mesh = jax.make_mesh((2, 2), ("features", "other"), axis_types=(kind, kind), devices=jax.devices("cpu")[:4])
    y0 = np.random.default_rng(0).random((8, 33)) < 0.5
    expected = dense_reference(network, y0)
    for form in (y0, y0.astype(np.float32), pack_bits(y0)):
        sharded = jax.device_put(form, NamedSharding(mesh, P(("features", "other"))))
        compiled = jax.jit(infer).lower(plan, sharded).compile()
        assert "all-" not in str(compiled.as_text())
        found = jax.jit(infer)(plan, sharded)
        assert found.sharding.spec[0] == ("features", "other")
        np.testing.assert_allclose(found, expected, atol=1e-4)
        active = jax.jit(ops.activations_and_active)(plan, sharded)[2]
        np.testing.assert_array_equal(active, ops.categories_and_active(plan, y0)[1])
    np.testing.assert_allclose(infer_sharded(replicate(plan, mesh), y0, mesh), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("precision", "says"),
    [("float32", "precision = [HIGHEST, HIGHEST]"), ("tf32", "precision = [HIGH, HIGH]"), ("bfloat16", "xbf16>")],
)
def test_lowers_for_gpus(dense: Callable[[int], None], with_gpu: None, precision: Any, says: str) -> None:
    """What XLA is asked for: inputs of the precision, sums of float32."""
    plan = build_plan(random_network(5, WIDTHS), precision=precision)
    lowered = jax.jit(infer).trace(plan, features()).lower(lowering_platforms=("cuda",))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 4
    assert all(says in line and line.rstrip().endswith("xf32>") for line in products)


# --- plans ------------------------------------------------------------------------------------------------------------


def test_saved_plans_make_their_dense_weights_again(dense: Callable[[int], None], tmp_path: Any) -> None:
    plan, y0 = build_plan(random_network(6, WIDTHS), precision="bfloat16"), features()
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan", precision="bfloat16")
    np.testing.assert_array_equal(infer(again, y0), infer(plan, y0))
    assert again.summary() == plan.summary()
    assert Plan.open(tmp_path / "plan").dense is None


def test_parts_run_on_the_kernels(dense: Callable[[int], None]) -> None:
    network, y0 = random_network(7, WIDTHS), features()
    y = y0
    for part in build_plan(network).split(2):
        assert part.dense is None
        y = infer(part, y)
    np.testing.assert_allclose(y, dense_reference(network, y0), atol=1e-4)


def test_mistakes_are_named() -> None:
    network: Any = random_network(8, [4, 3])
    unknown: list[Any] = ["float64", 32]
    for precision in unknown:
        with pytest.raises(ValueError, match="precision must be one of float32, tf32, bfloat16"):
            build_plan(network, precision=precision)
    with pytest.raises(ValueError, match="leave it at 'auto'"):
        build_plan(network, kernel="grouped", precision="tf32")
    assert build_plan(network, kernel="grouped").dense is None


def test_none_at_all(dense: Callable[[int], None], tmp_path: Any) -> None:
    network, y0 = random_network(9, WIDTHS), features()
    plan = build_plan(network, precision=None)
    assert plan.dense is None
    np.testing.assert_array_equal(infer(plan, y0), infer(build_plan(network).with_precision(None), y0))
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan", precision=None).dense is None


# --- the rule ---------------------------------------------------------------------------------------------------------


def square(neurons: int, density: float, seed: int = 0) -> SparseLayer:
    matrix = sp.random(neurons, neurons, density=density, dtype=np.float32, rng=np.random.default_rng(seed))
    return SparseLayer.from_scipy(matrix)


def test_sparse_layers_stay_with_the_kernels_bit_for_bit() -> None:
    """Plans as they were: one leaf, the same words, the same program."""
    plan = build_plan([square(600, 0.05)] * 2)
    assert plan.dense is not None
    assert plan.dense.layers == ()
    assert len(jax.tree.leaves(plan)) == 1
    assert "for no layer, the kernels are faster at 5% of the weights" in plan.summary()
    assert "narrower than 512 neurons" in build_plan([square(60, 0.9)]).summary()


def test_dense_layers_are_dense_products() -> None:
    """By their density and the number of features, as the summary says."""
    plan = build_plan([square(600, 0.02), square(600, 0.9), square(600, 0.9, 1)], cap=None)
    assert plan.dense is not None
    assert plan.dense.layers == (1, 2)
    assert chosen(plan, 4096) == (1, 2)
    assert "for 2 of 3" in plan.summary()
    assert plan.dense.nbytes == 2 * 4 * (600 * 600 + 600)
    assert f"{plan.dense.nbytes / 2**20:,.1f} MiB beside the plan" in plan.summary()
    csr = 4 * (2 * plan.edges + 3 * 601)
    assert f"together {(plan.nbytes + plan.dense.nbytes) / csr:.2f} times the CSR" in plan.summary()
    assert "precision=None leaves them out" in plan.summary()
    alone = plan.with_precision(None).summary()
    assert f"{plan.nbytes / csr:.2f} times what the network takes in CSR" in alone
    assert "beside the plan" not in alone
    network = SparseNetwork([square(600, 0.02), square(600, 0.9), square(600, 0.9, 1)], cap=None)
    y0 = features(300, 600)
    expected = dense_reference(network, y0)
    np.testing.assert_allclose(infer(plan, y0), expected, atol=1e-5 * np.abs(expected).max())


def test_the_least_dense_layers_find_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [square(600, density) for density in (0.7, 0.9, 0.8)]
    monkeypatch.setattr(costs, "MOST_BYTES", 2 * 4 * 600 * 600)
    plan = build_plan(layers)
    assert plan.dense is not None
    assert plan.dense.layers == (1, 2)


@pytest.mark.parametrize("device", ["cpu", "gpu"])
@pytest.mark.parametrize("precision", costs.PRECISIONS)
def test_the_rule_is_monotonous_in_density(device: Any, precision: Any) -> None:
    """A denser layer is a dense product wherever a sparser one is; rounding more never takes one away."""
    tables = [build_plan([square(600, density)]).table for density in (0.01, 0.1, 0.3, 0.6, 0.9)]
    for count in (0, 1, 100, 60000, 10**7):
        taken = [costs.chosen(table, (0,), device, precision, count) for table in tables]
        assert sorted(taken) == taken
        exact = [costs.chosen(table, (0,), device, "float32", count) for table in tables]
        assert all(len(a) >= len(b) for a, b in zip(taken, exact, strict=True))


def test_a_plan_is_not_cut_for_little() -> None:
    """One small dense layer: for a single feature, copying the others' words would cost more than it gains."""
    widening = SparseLayer.from_scipy(sp.eye_array(512, 2000))
    plan = build_plan([square(512, 0.9), widening, square(2000, 0.2)])
    alone = build_plan([square(512, 0.9)])
    assert chosen(alone, 1) == chosen(alone, 4096) == chosen(plan, 4096) == (0,)
    assert chosen(plan, 1) == ()
