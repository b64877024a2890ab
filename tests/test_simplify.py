"""Lossless compression: what is merged, what must not be, and that outputs stay the same."""

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.trained_network import trained_network
from spdnn_jax import Clip, Plan, SparseLayer, SparseNetwork, build_plan, infer, ops, planner
from spdnn_jax.graph_challenge import oracle, radixnet
from spdnn_jax.graph_challenge.inputs import digits
from spdnn_jax.simplify import COMPRESS, Compress, Simplified, simplify
from tests.conftest import dense_reference, random_network

ULP = np.float32(2**-24)  # 0.5 + ULP is the float32 that follows 0.5


def network_of(
    *layers: tuple[Any, Any], cap: float | None = 32.0, activation: Clip | tuple[Clip, ...] | None = None
) -> SparseNetwork:
    """A network from dense matrices (inputs, outputs) and biases; a NaN is an edge that stores 0."""
    built = []
    for matrix, bias in layers:
        layer = SparseLayer.from_dense(np.where(np.isnan(matrix), 7, matrix), np.asarray(bias, np.float32))
        values = np.asarray(layer.values).copy()
        values[values == 7] = 0
        built.append(SparseLayer(layer.indptr, layer.indices, values, layer.bias, layer.inputs))
    return SparseNetwork(built, Clip.relu(cap) if activation is None else activation)


def pairs_of(network: SparseNetwork) -> Iterable[tuple[SparseLayer, Clip]]:
    return zip(network.layers, network.activation, strict=True)


def widths(network: SparseNetwork) -> list[int]:
    return [layer.outputs for layer in network.layers]


def dense(network: SparseNetwork) -> list[np.ndarray]:
    return [layer.to_scipy().toarray() for layer in network.layers]


def assert_same_network(a: SparseNetwork, b: SparseNetwork) -> None:
    assert widths(a) == widths(b)
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.inputs == other.inputs
        np.testing.assert_array_equal(one.indptr, other.indptr)
        np.testing.assert_array_equal(one.indices, other.indices)
        np.testing.assert_array_equal(np.broadcast_to(one.values, one.edges), np.broadcast_to(other.values, one.edges))
        np.testing.assert_array_equal(np.broadcast_to(one.bias, one.outputs), np.broadcast_to(other.bias, one.outputs))


def with_duplicates(seed: int, sizes: list[int], activation: Clip) -> SparseNetwork:
    """A random network in which outputs repeat, some have no edges, and some edges store 0."""
    generator = np.random.default_rng(seed)
    layers = []
    for inputs, outputs in itertools.pairwise(sizes):
        distinct = generator.integers(1, outputs + 1)
        matrix = generator.normal(size=(inputs, distinct)) * (generator.random((inputs, distinct)) < 0.4)
        matrix[generator.random(matrix.shape) < 0.05] = np.nan
        matrix[:, generator.random(distinct) < 0.2] = 0
        bias = generator.choice([-0.3, -0.0, 0.0, 0.2, 40], size=distinct)
        copies = generator.integers(distinct, size=outputs)
        layers.append((matrix[:, copies], bias[copies]))
    return network_of(*layers, activation=activation)


# --- outputs stay the same --------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    sizes=st.lists(st.integers(1, 24), min_size=2, max_size=6),
    activation=st.sampled_from([Clip.relu(), Clip.relu(1), Clip.relu(32), Clip(-1, 1), Clip(0.5, 2), Clip.identity()]),
)
def test_outputs_are_those_of_the_oracle(seed: int, sizes: list[int], activation: Clip) -> None:
    """Merging, folding and dropping must change no output, in whatever mixture they come."""
    network = with_duplicates(seed, sizes, activation)
    small, expansion = simplify(network)
    small.validate()
    y0 = np.random.default_rng(seed).random((7, sizes[0]), np.float32)
    expected = oracle.infer(network, y0).activations
    scale = max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(expansion.expand(oracle.infer(small, y0).activations), expected, atol=1e-5 * scale)  # pyright: ignore[reportArgumentType]


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("compress", ["neurons", "full"])
@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("seed", range(4))
def test_plans_restore_every_original_output(compress: Compress, backend: ops.Backend, seed: int) -> None:
    """A back end that mixes up the width of the last layer and the number of outputs writes outside its rows."""
    network = with_duplicates(seed, [30, 50, 40, 60], Clip.relu(32))
    plan = build_plan(network, compress=compress)
    y0 = np.random.default_rng(seed).random((70, 30), np.float32)
    expected = oracle.infer(network, y0)
    scale = max(1.0, np.abs(expected.activations).max())
    result = infer(plan, y0, backend=backend)
    assert result.shape == (70, plan.outputs) == (70, 60)
    np.testing.assert_allclose(result, expected.activations, atol=1e-5 * scale)
    alive, _ = ops.categories_and_active(plan, y0, backend=backend)
    np.testing.assert_array_equal(alive, expected.categories)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("compress", COMPRESS)
@pytest.mark.parametrize("kernel", ["grouped", "resident"])
@pytest.mark.parametrize("seed", range(4))
def test_plans_restore_every_original_output_on_a_gpu(compress: Compress, kernel: planner.Kernel, seed: int) -> None:
    """As above, for the CUDA back end."""
    network = with_duplicates(seed, [30, 50, 40, 60], Clip.relu(32))
    plan = build_plan(network, compress=compress, kernel=kernel)
    y0 = np.random.default_rng(seed).random((300, 30), np.float32)
    expected = oracle.infer(network, y0)
    scale = max(1.0, np.abs(expected.activations).max())
    np.testing.assert_allclose(infer(plan, y0), expected.activations, atol=2e-5 * scale)
    np.testing.assert_array_equal(ops.categories_and_active(plan, y0)[0], expected.categories)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 24), min_size=2, max_size=6))
def test_the_result_is_a_fixed_point(seed: int, sizes: list[int]) -> None:
    """One pass forward and one back must leave nothing to do."""
    small, _ = simplify(with_duplicates(seed, sizes, Clip.relu(32)))
    again, expansion = simplify(small)
    assert_same_network(again, small)
    np.testing.assert_array_equal(expansion.outputs, np.arange(small.outputs))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), sizes=st.lists(st.integers(1, 24), min_size=2, max_size=6))
def test_hash_collisions_change_nothing(seed: int, sizes: list[int]) -> None:
    """Rows of one hash must be compared exactly: with no bits of the hash left, all rows have one."""
    network = with_duplicates(seed, sizes, Clip.relu(32))
    collided = Simplified(pairs_of(network), hash_mask=0)
    small, expansion = simplify(network)
    np.testing.assert_array_equal(collided.expansion.outputs, expansion.outputs)
    assert_same_network(SparseNetwork((layer for layer, _, _ in collided), network.activation), small)


def test_threads_change_nothing() -> None:
    network = SparseNetwork(tuple(radixnet.layers(1024, 12)))
    one, many = (
        SparseNetwork(layer for layer, _, _ in Simplified(pairs_of(network), threads=threads)) for threads in (1, 7)
    )
    assert_same_network(one, many)


# --- what must stay apart ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("matrix", "bias"),
    [
        ([[0.5, 0.5 + ULP], [1, 1]], [0, 0]),
        ([[0.5, 0.5], [1, 0], [0, 1]], [0, 0]),
        ([[0.5, 0.5], [1, 1]], [0.5, 0.5 + ULP]),
        ([[0.5, 0.5], [0, 1]], [0, 0]),
        ([[0.5, -0.5]], [0, 0]),
    ],
    ids=["weight's last bit", "index", "bias's last bit", "one edge more", "sign"],
)
def test_neurons_that_differ_by_the_least_stay_apart(matrix: object, bias: object) -> None:
    network = network_of((matrix, bias))
    small, expansion = simplify(network)
    assert_same_network(small, network)
    np.testing.assert_array_equal(expansion.outputs, [0, 1])


def test_merged_inputs_whose_weights_differ_keep_their_readers_apart() -> None:
    """Readers of one class with other sums must not be merged: the sum counts, not the index set."""
    network = network_of(([[1, 1]], [0, 0]), ([[0.25, 0.25], [0.5, 0.25]], 0))
    small, _ = simplify(network)
    assert widths(small) == [1, 2]
    np.testing.assert_array_equal(dense(small)[1], [[0.75, 0.5]])


@pytest.mark.parametrize(
    "network", [random_network(5, [40, 50, 30, 20]), random_network(6, [30, 50, 40], bias="scalar")]
)
def test_a_network_without_equal_neurons_comes_out_as_it_went_in(network: SparseNetwork) -> None:
    small, expansion = simplify(network)
    assert_same_network(small, network)
    np.testing.assert_array_equal(expansion.outputs, np.arange(network.outputs))


def test_the_trained_network_keeps_its_outputs(shared_data: Path) -> None:
    """Weights of a real, pruned network: nothing in it was made for this rewrite."""
    network = trained_network(shared_data / "trained" / "mnist-128x18.tar.gz")
    small, expansion = simplify(network)
    y0 = np.random.default_rng(0).random((50, network.inputs), np.float32)
    np.testing.assert_allclose(
        expansion.expand(dense_reference(small, y0)),  # pyright: ignore[reportArgumentType]
        dense_reference(network, y0),
        atol=1e-5,
    )


# --- what must be merged, folded, dropped -----------------------------------------------------------------------------


def test_zeros_are_no_edges_and_have_no_sign() -> None:
    """-0.0 and 0.0, as weight and as bias, and an absent edge are the same."""
    layer = SparseLayer(
        np.array([0, 2, 4, 5]),
        np.array([0, 1, 0, 1, 0], np.int32),
        np.array([1, 0.0, 1, -0.0, 1], np.float32),
        np.array([0.0, -0.0, 0.0], np.float32),
        2,
    )
    small, expansion = simplify(SparseNetwork((layer,)))
    assert widths(small) == [1]
    assert small.edges == 1
    np.testing.assert_array_equal(expansion.outputs, [0, 0, 0])


def test_weights_of_merged_inputs_are_added_up() -> None:
    network = network_of(([[1, 1, 1, 2]], 0), ([[0.25], [0.5], [1], [3]], 0))
    small, _ = simplify(network)
    np.testing.assert_array_equal(dense(small)[0], [[1, 2]])
    np.testing.assert_array_equal(dense(small)[1], [[1.75], [3]])


def test_sums_do_not_depend_on_the_order_of_what_was_merged() -> None:
    """Sums in float64 round, too: readers of the same weights in another order must still be merged."""
    weights = np.array([1e30, 1, -1e30, 3], np.float32)
    network = network_of((np.ones((1, 4)), 0), (np.stack([weights, weights[[1, 2, 0, 3]]], axis=1), 0))
    small, _ = simplify(network)
    assert widths(small) == [1, 1]


def test_weights_that_cancel_leave_no_edge() -> None:
    """The neurons behind a sum of zero are read by nobody, and the reader is a constant."""
    network = network_of(([[1, 1, 2]], -0.1), ([[0.5, 0], [-0.5, 0], [0, 1]], [0.25, 0]), ([[1], [2]], 0))
    small, _ = simplify(network)
    assert widths(small) == [1, 1, 1]
    np.testing.assert_array_equal(small.layers[2].bias, 0.25)


def test_constants_are_folded_and_merge_what_reads_them() -> None:
    """Two readers that differ only in which constant of one value they read are equal."""
    network = network_of(([[0, 0, 0, 1]], [0.5, 0.5, -3, 0]), ([[1, 0], [0, 1], [5, 9], [1, 1]], [-0.25, -0.25]))
    small, expansion = simplify(network)
    assert widths(small) == [1, 1]
    np.testing.assert_array_equal(small.layers[1].bias, 0.25)
    np.testing.assert_array_equal(expansion.outputs, [0, 0])


@pytest.mark.parametrize(
    ("activation", "folded"),
    [
        (Clip.relu(2), 2.0),
        (Clip.relu(), 3.0),
        ((Clip(-1, 1), Clip.identity()), 1.0),
        ((Clip(5, 6), Clip.relu()), 5.0),
        ((Clip(-4, -2), Clip.identity()), -2.0),
    ],
)
def test_a_constant_is_clipped_before_it_is_folded(activation: Clip | tuple[Clip, ...], folded: float) -> None:
    """By its own layer's activation, not by that of the layer that reads it."""
    network = network_of(([[0, 1]], [3, 0]), ([[1], [1]], 0), activation=activation)
    small, _ = simplify(network)
    np.testing.assert_array_equal(small.layers[1].bias, folded)


def test_a_cap_reached_from_below_merges_nothing() -> None:
    """Neurons that agree at the cap only, for some inputs, are not equal."""
    network = network_of(([[1, 2]], 0), ([[1, 1], [1, 2]], 0), cap=1.0)
    assert_same_network(simplify(network)[0], network)


def test_constant_outputs_of_the_last_layer_stay() -> None:
    network = network_of(([[0, 1, 0, 0]], [0.5, 0, 0.5, -2]))
    small, expansion = simplify(network)
    np.testing.assert_array_equal(expansion.expand(dense_reference(small, np.ones((1, 1)))), [[0.5, 1, 0.5, 0]])  # pyright: ignore[reportArgumentType]
    assert widths(small) == [3]


def test_unread_neurons_are_dropped_all_the_way_back() -> None:
    network = network_of(([[1, 2, 3]], 0), ([[1, 0], [0, 1], [0, 1]], 0), ([[1], [0]], 0))
    small, _ = simplify(network)
    assert widths(small) == [1, 1, 1]


@pytest.mark.usefixtures("on_cpu")
def test_a_network_that_reads_nothing_runs() -> None:
    """All outputs are constant: no layer may be left without neurons, which no back end knows."""
    network = network_of(([[1, 2]], 0), ([[0, 0], [0, 0]], [0.5, -1]), ([[2, 0], [1, 0]], [0, -1]))
    small, _ = simplify(network)
    assert widths(small) == [1, 1, 2]
    result = infer(build_plan(network, compress="neurons"), np.ones((3, 1), np.float32))
    np.testing.assert_array_equal(result, [[1, 0]] * 3)


def test_generated_networks_have_one_output_of_sixteen() -> None:
    plan = build_plan(radixnet.layers(1024, 120), compress="neurons")
    assert (plan.table.layers["outputs"] <= 64).all()
    np.testing.assert_array_equal(plan.layer_edges, [32768] * 120)
    assert plan.outputs == 1024
    assert plan.multiplied_edges.sum() < plan.edges / 16


@pytest.mark.usefixtures("on_cpu")
def test_categories_of_a_challenge_network_stay_the_same() -> None:
    y0 = digits(1024, 500)
    expected = oracle.infer(radixnet.layers(1024, 40), y0)
    assert 0 < expected.categories.sum() < 500
    for compress in COMPRESS[1:]:
        plan = build_plan(radixnet.layers(1024, 40), compress=compress)
        alive, active = ops.categories_and_active(plan, y0)
        np.testing.assert_array_equal(alive, expected.categories)
        np.testing.assert_array_equal(active, expected.active)


# --- equal features ---------------------------------------------------------------------------------------------------
#
# The CPU back end computes a feature bit for bit alike whatever stands beside it: merging must not change a bit.


def assert_merging_features_changes_nothing(network: SparseNetwork, y0: np.ndarray) -> np.ndarray:
    """Returns the activations."""
    plain, merging = (build_plan(network, compress=compress) for compress in ("neurons", "full"))
    expected = np.asarray(infer(plain, y0))
    np.testing.assert_array_equal(np.asarray(infer(merging, y0)), expected)
    for got, wanted in zip(ops.categories_and_active(merging, y0), ops.categories_and_active(plain, y0), strict=True):
        np.testing.assert_array_equal(got, wanted)
    return expected


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("count", [1, 2, 15, 64, 65, 1000])
@pytest.mark.parametrize("bias", [-0.05, 0.05], ids=["features die", "no feature dies"])
@pytest.mark.parametrize("cap", [1.0, None], ids=["features saturate", "features stay apart"])
def test_equal_features_share_their_results(count: int, bias: float, cap: float | None) -> None:
    """Followers must get their leader's result, leaders that follow others later included, and be counted as active."""
    generator = np.random.default_rng(count)
    layers = [SparseLayer.from_dense(generator.random((40, 40)) * 0.08, bias) for _ in range(40)]
    distinct = (
        generator.random((max(1, count // 3), 40), np.float32) * (generator.random(max(1, count // 3)) < 0.7)[:, None]
    )
    y0 = distinct[generator.integers(len(distinct), size=count)].astype(np.float32)
    y0[::7, 3] *= 1.0000002
    assert_merging_features_changes_nothing(SparseNetwork(layers, cap=cap), y0)


@pytest.mark.usefixtures("on_cpu")
def test_equal_features_of_a_challenge_network() -> None:
    network = radixnet.network(1024, 60)
    y0 = digits(1024, 3000)
    result = assert_merging_features_changes_nothing(network, y0)
    assert len(np.unique(result, axis=0)) < 10, "many features must have met"


@pytest.mark.usefixtures("on_cpu")
def test_features_of_one_hash_are_told_apart() -> None:
    """Beside 2^20 the rounding of a hash swallows what the features differ by: they must be compared exactly."""
    width = 200
    carry = np.eye(width) + 1e-30  # so many edges that the CPU back end looks for equal features after the layer
    tell = np.eye(width)
    tell[0, 0] = 1e-6
    network = SparseNetwork(tuple(SparseLayer.from_dense(matrix) for matrix in (carry, carry, tell)), cap=None)
    y0 = np.zeros((60, width), np.float32)
    y0[:, 0] = 2**20
    y0[np.arange(60), 1 + np.arange(60) // 2] = 1e-3
    result = assert_merging_features_changes_nothing(network, y0)
    assert len(np.unique(result, axis=0)) == 30


@pytest.mark.usefixtures("on_cpu")
def test_features_that_are_not_numbers_stay_alone() -> None:
    """A NaN equals nothing, itself included, and must neither hang the search nor spread to other features."""
    layers = [SparseLayer.from_dense(np.full((20, 20), 0.06), 0.01) for _ in range(20)]
    y0 = np.ones((30, 20), np.float32)
    y0[::4, 5] = np.nan
    result = assert_merging_features_changes_nothing(SparseNetwork(tuple(layers)), y0)
    layer_of_zeros = SparseNetwork(tuple(layers[1:]))  # a sum that is NaN becomes the lower bound, 0
    expected = np.where(
        np.isnan(y0).any(axis=1, keepdims=True), infer(build_plan(layer_of_zeros), np.zeros_like(y0)), result
    )
    np.testing.assert_allclose(result, expected, rtol=1e-5)


# --- refusals, figures, files -----------------------------------------------------------------------------------------


def test_sums_past_float32_are_refused() -> None:
    network = network_of(([[1, 1]], 0), ([[3e38], [3e38]], 0))
    with pytest.raises(ValueError, match="layer 2: the merged weights of output neuron 0 are too large"):
        simplify(network)


def test_bad_layers_are_named() -> None:
    good, narrow = SparseLayer.from_dense(np.ones((4, 4))), SparseLayer.from_dense(np.ones((3, 4)))
    nan = SparseLayer(good.indptr, good.indices, np.full(16, np.nan, np.float32), good.bias, 4)
    with pytest.raises(ValueError, match="layer 2: weight 0 is not finite"):
        build_plan([good, nan], compress="neurons")
    with pytest.raises(ValueError, match="layer 2: has 3 inputs, but the layer before has 4 outputs"):
        build_plan([good, narrow], compress="neurons")
    with pytest.raises(ValueError, match="at least one layer"):
        build_plan([], compress="neurons")
    with pytest.raises(ValueError, match="compress must be one of none, neurons, full"):
        build_plan([good], compress="some")  # pyright: ignore[reportArgumentType]


def test_the_summary_says_what_was_merged_where() -> None:
    network = network_of(([[1, 1, 0, 2]], [0, 0, 1, 0]), ([[1], [1], [1], [0]], 0))
    summary = build_plan(network, compress="neurons").summary()
    assert "compress=neurons: 2 edges to multiply, 33.3% of the original network's" in summary
    assert "layer 1: 1 of 4 outputs left (1 merged, 1 constant, 1 unread), 1 edges" in summary
    assert "compress" not in build_plan(network).summary()


@pytest.mark.parametrize("compress", COMPRESS)
def test_a_saved_plan_remembers_its_compression(compress: Compress, tmp_path: Path) -> None:
    plan = build_plan(radixnet.layers(64, 5), compress=compress)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.compress == compress
    y0 = np.random.default_rng(0).random((9, 64)) < 0.3
    np.testing.assert_array_equal(infer(again, y0), infer(plan, y0))


def test_derivatives_are_those_of_the_original_network() -> None:
    network = with_duplicates(1, [12, 20, 16], Clip.relu())
    y0 = np.random.default_rng(0).random((3, 12), np.float32)
    expected, got = (
        jax.grad(lambda y, plan: infer(plan, y).sum())(y0, build_plan(network, compress=compress, derivatives=True))
        for compress in COMPRESS[:2]
    )
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
