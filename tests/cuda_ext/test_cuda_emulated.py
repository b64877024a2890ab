"""The CUDA kernels on the CPU (see emulate.py): the sources that a GPU runs, under the address sanitizer."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, pack_bits, planner
from spdnn_jax.graph_challenge import oracle, radixnet
from spdnn_jax.simplify import Compress
from tests.conftest import random_network
from tests.emulator import emulate

FAMILIES = ("staged", "grouped", "resident", "chain", "spread")
FUSING = ("resident", "chain")  # many layers in a launch
SIDE_BY_SIDE: list[tuple[planner.Action, ...]] = [  # by what plans hold, whose sections differ
    ("staged", "grouped", "resident"),
    ("grouped", "resident", "chain"),
]
CLIPS = [Clip.relu(cap) for cap in (None, 0.7, 1, 32, 2.0**40)] + [Clip(-1, 1), Clip(0.5, 2), Clip.identity()]
MIXED = [
    (Clip(-1, 1), Clip(-1, 1), Clip(-1, 1)),
    (Clip.relu(6), Clip.relu(6), Clip.relu(6)),
    (Clip.relu(32), Clip.relu(32), Clip.identity()),
    (Clip.identity(), Clip.relu(4), Clip(-4, 4)),
    (Clip.relu(0.5), Clip.relu(2), Clip(0.25, 3)),
]

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))


@pytest.fixture(scope="module")
def emulator(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> emulate.Emulator:
    return emulate.Emulator(emulate.build(session_folder / "emulator"), tmp_path_factory.mktemp("emulator"))


@pytest.fixture(scope="module")
def colliding(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> emulate.Emulator:
    """All features have one of two hashes."""
    program = emulate.build(session_folder / "emulator", "SPDNN_FEATURE_HASH_MASK=uint64_t{1}")
    return emulate.Emulator(program, tmp_path_factory.mktemp("colliding"))


def check(result: emulate.Result, network: SparseNetwork, y0: np.ndarray) -> None:
    """Compares with the float64 oracle, within its bounds of the error."""
    expected = oracle.infer(network, y0, errors=True)
    if result.activations.size:
        assert (np.abs(result.activations - expected.activations) <= expected.errors).all()
    clear = ~expected.close_calls
    np.testing.assert_array_equal(result.alive[clear], expected.categories[clear])
    assert result.active[-1] == result.alive.sum()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("count", "form"), [(1, "packed"), (3, "uint8"), (4, "float32"), (33, "uint8"), (129, "packed")]
)
def test_tile_boundaries(emulator: emulate.Emulator, family: planner.Kernel, count: int, form: str) -> None:
    """Rows of 45 neurons are not aligned to what a thread loads, those of 80 are, but for the last packed word."""
    generator = np.random.default_rng(count)
    for inputs in (45, 80):
        network = random_network(7, [inputs, 33, 64, 20], bias="negative", grouped=3)
        plain = generator.random((count, inputs)) < 0.3
        y0 = {"packed": pack_bits(plain), "float32": generator.random(plain.shape, np.float32)}.get(
            form, generator.integers(0, 256, plain.shape, np.uint8) * plain
        )
        check(emulator.run(build_plan(network, kernel=family), y0), network, plain if form == "packed" else y0)


@pytest.mark.parametrize("width", [60, 500])
@pytest.mark.parametrize("one_value", [False, True])
def test_chains_of_many_features(emulator: emulate.Emulator, width: int, one_value: bool) -> None:
    """Narrow layers, of which a block holds 32 features, a lane each, and wider ones, whose features lanes share.

    All blocks have work with 128 features.
    """
    network = random_network(
        9, [width, 70, width, 20], density=0.1, activation=Clip(-1, 2), bias="vector", one_value=one_value
    )
    plan = build_plan(network, kernel="chain")
    for count in (75, 150):
        y0 = np.random.default_rng(width).random((count, width), np.float32)
        check(emulator.run(plan, y0), network, y0)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.sampled_from([1, 2, 31, 33, 100, 2049]), min_size=2, max_size=6),
    density=st.sampled_from([0.0, 0.01, 0.3]),
    one_value=st.booleans(),
    grouped=st.sampled_from([1, 2, 5, 16, 40]),
    bias=st.sampled_from(["vector", "scalar", "negative"]),
    clip=st.sampled_from(CLIPS),
    count=st.sampled_from([1, 2, 3, 5, 8, 9, 33]),
    form=st.sampled_from(["float32", "uint8", "packed"]),
    compress=st.sampled_from(["none", "neurons", "full"]),
    activations=st.booleans(),
)
def test_few_features_are_spread(
    emulator: emulate.Emulator,
    seed: int,
    widths: list[int],
    density: float,
    one_value: bool,
    grouped: int,
    bias: str,
    clip: Clip,
    count: int,
    form: str,
    compress: Compress,
    activations: bool,
) -> None:
    """Groups of 1 to 8 features, one after the other where there are more; and layers without work for a block."""
    network = random_network(
        seed, widths, activation=clip, density=density, one_value=one_value, grouped=grouped, bias=bias
    )
    generator = np.random.default_rng(seed)
    plain = generator.random((count, widths[0])) < 0.5
    y0 = {"packed": pack_bits(plain), "uint8": plain.astype(np.uint8) * np.uint8(3)}.get(
        form, generator.random(plain.shape, np.float32)
    )
    plan = build_plan(network, kernel="spread", compress=compress)
    check(emulator.run(plan, y0, activations=activations, seed=seed), network, plain if form == "packed" else y0)


def test_wide_layers_are_spread(emulator: emulate.Emulator) -> None:
    """Inputs that no shared memory holds, with indices of 16 and of 32 bits; and the NaN that stands for no value."""
    generator = np.random.default_rng(0)
    for width, count, grouped in ((60_000, 3, 1), (70_001, 1, 5)):
        network = random_network(5, [width, 50, width, 4], density=0.001, grouped=grouped, bias="vector")
        y0 = generator.random((count, width), np.float32)
        plan = build_plan(network, kernel="spread")
        check(emulator.run(plan, y0), network, y0)
        y0.view(np.uint32)[0, ::2] = 0xFFFFFFFF
        missing = emulator.run(plan, y0).activations
        assert np.isfinite(missing).all()
        y0[0] = 0
        np.testing.assert_array_equal(missing[1:], emulator.run(plan, y0).activations[1:])
    network = random_network(6, [5, 60_000, 40, 7], density=0.01, bias="vector")
    y0 = generator.random((9, 5), np.float32)
    check(emulator.run(build_plan(network, kernel="spread"), y0), network, y0)  # groups, one after the other


@pytest.mark.parametrize("outputs", [1, 4])
@pytest.mark.parametrize("form", ["uint8", "packed"])
def test_a_first_layer_of_wide_rows(emulator: emulate.Emulator, outputs: int, form: str) -> None:
    """So wide that a block holds 16 of them; rows of more than 256 edges, whose bytes fill a half of a register."""
    network = random_network(3, [4100, 40, 20], density=0.1, grouped=outputs, one_value=outputs == 1, cap=None)
    plain = np.random.default_rng(0).integers(0, 256, (37, 4100), np.uint8)
    y0 = pack_bits(plain > 200) if form == "packed" else plain
    check(emulator.run(build_plan(network, kernel="grouped"), y0), network, plain > 200 if form == "packed" else plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_features_that_die_and_revive(emulator: emulate.Emulator, family: planner.Kernel) -> None:
    """Most die in the first layers and leave the lists; with a positive bias later, all must stay."""
    generator = np.random.default_rng(0)
    y0 = (generator.random((150, 256)) < generator.random((150, 1))).astype(np.uint8)
    layers = list(radixnet.layers(256, 12))
    dying = SparseNetwork(tuple(layers))
    expected = oracle.infer(layers, y0)
    assert 0 < expected.active[-1] < expected.active[0]
    result = emulator.run(build_plan(dying, kernel=family), y0)
    check(result, dying, y0)
    np.testing.assert_array_equal(result.active, expected.active)
    if family in FUSING:  # and all of them in one launch, in which memory of earlier layers is used again
        result = emulator.run(build_plan(dying, kernel=family), y0, steps=[planner.Step(family, 0, 12)])
        check(result, dying, y0)
        np.testing.assert_array_equal(result.active, expected.active)
    revived = SparseNetwork((*layers[:6], SparseLayer.from_scipy(scipy.sparse.eye_array(256).tocsr(), bias=0.25)))
    check(emulator.run(build_plan(revived, kernel=family), y0), revived, y0)


@pytest.mark.parametrize("family", FAMILIES)
def test_numbers_that_are_none(emulator: emulate.Emulator, family: planner.Kernel) -> None:
    """As on the CPU: a sum that is NaN becomes the lower bound, and an overflow stays finite."""
    largest = np.finfo(np.float32).max
    grows = SparseLayer.from_dense(np.full((3, 3), 3e38))
    for clip, lower in ((Clip.relu(32), 0), (Clip(-1, 1), -1), (Clip.identity(), -largest)):
        y0 = np.ones((40, 3), np.float32)
        y0[33, 1] = np.nan
        result = emulator.run(build_plan(SparseNetwork((grows,), clip), kernel=family), y0).activations
        expected = np.full((40, 3), min(largest, clip.upper), np.float32)
        expected[33] = lower
        np.testing.assert_array_equal(result, expected)
    deep = build_plan(SparseNetwork((grows,) * 3, Clip.identity()), kernel=family)
    np.testing.assert_array_equal(emulator.run(deep, np.ones((5, 3), np.float32)).activations, largest)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edges", [0, 5000])
def test_rows_of_any_length(emulator: emulate.Emulator, family: planner.Kernel, edges: int) -> None:
    generator = np.random.default_rng(edges)
    inputs = 6000
    dense = np.zeros((inputs, 9))
    dense[generator.choice(inputs, min(edges, inputs), replace=False), 4] = generator.normal() * 0.1
    dense[:5, 7] = 0.3
    network = SparseNetwork((SparseLayer.from_dense(dense, -0.01),))
    y0 = generator.random((35, inputs), np.float32)
    check(emulator.run(build_plan(network, kernel=family), y0), network, y0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("widths", [[0, 5, 4], [5, 0, 4], [5, 4, 0]])
def test_layers_without_neurons(emulator: emulate.Emulator, family: planner.Kernel, widths: list[int]) -> None:
    """A launch of no blocks is an error of its own."""
    for bias in ("scalar", "negative"):
        network = random_network(0, widths, bias=bias)
        y0 = np.ones((7, widths[0]), np.uint8)
        check(emulator.run(build_plan(network, kernel=family), y0), network, y0)


@pytest.mark.parametrize(("grouped", "form"), [(1, "float32"), (5, "float32"), (1, "uint8"), (5, "packed")])
def test_indices_of_32_bits(emulator: emulate.Emulator, grouped: int, form: str) -> None:
    network = random_network(5, [70001, 50, 4], density=0.001, grouped=grouped)
    generator = np.random.default_rng(0)
    plain = generator.random((5, 70001)) < 0.5
    y0 = {"packed": pack_bits(plain), "uint8": generator.integers(0, 256, plain.shape, np.uint8)}.get(
        form, generator.random(plain.shape, np.float32)
    )
    check(emulator.run(build_plan(network), y0), network, plain if form == "packed" else y0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_threads_changes_no_bit(emulator: emulate.Emulator, family: planner.Kernel) -> None:
    """A barrier that is missing shows as a result that depends on who came first."""
    network = random_network(3, [200, 150, 100, 70], bias="negative")
    plan, y0 = build_plan(network, kernel=family), np.random.default_rng(0).random((70, 200), np.float32)
    first = emulator.run(plan, y0, seed=1)
    check(first, network, y0)
    for seed in (2, 3):
        np.testing.assert_array_equal(emulator.run(plan, y0, seed=seed).activations, first.activations)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("activation", MIXED, ids=str)
def test_activations_side_by_side(
    emulator: emulate.Emulator, family: planner.Kernel, activation: tuple[Clip, ...]
) -> None:
    """Layers that saturate at the unit, at another bound, below zero, or not at all: each as its own record says."""
    network = random_network(3, [60, 50, 40, 30], activation=activation, grouped=2)
    y0 = np.random.default_rng(0).random((70, 60), np.float32)
    check(emulator.run(build_plan(network, kernel=family), y0), network, y0)


@st.composite
def schedules(draw: st.DrawFn, layers: int, families: Sequence[planner.Action], searches: bool) -> list[planner.Step]:
    """Any families side by side, launches of any length, searches for equal features anywhere."""
    steps, layer = [], 0
    while layer < layers:
        if searches and layer and draw(st.booleans()):
            steps.append(planner.Step("equal features", layer, layer))
        action = draw(st.sampled_from(families))
        end = layer + (draw(st.integers(1, layers - layer)) if action in FUSING else 1)
        steps.append(planner.Step(action, layer, end))
        layer = end
    return steps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    seed=st.integers(0, 1000),
    widths=st.lists(st.sampled_from([1, 2, 31, 33, 64, 100, 600]), min_size=2, max_size=7),
    density=st.sampled_from([0.0, 0.02, 0.3]),
    one_value=st.booleans(),
    grouped=st.sampled_from([1, 3, 17, 40]),
    bias=st.sampled_from(["vector", "scalar", "negative"]),
    clips=st.lists(st.sampled_from(CLIPS), min_size=1, max_size=6),
    count=st.sampled_from([1, 5, 32, 63, 100]),
    compress=st.sampled_from(["none", "neurons", "full"]),
    activations=st.booleans(),
)
def test_any_schedule(
    emulator: emulate.Emulator,
    data: st.DataObject,
    seed: int,
    widths: list[int],
    density: float,
    one_value: bool,
    grouped: int,
    bias: str,
    clips: list[Clip],
    count: int,
    compress: Compress,
    activations: bool,
) -> None:
    """Each kind of step finds the features where the one before left them, in any order of kinds.

    The first cap that is a power of two sets the unit in which all layers hold activations.
    """
    activation = list(itertools.islice(itertools.cycle(clips), len(widths) - 1))
    network = random_network(
        seed, widths, activation=activation, density=density, one_value=one_value, grouped=grouped, bias=bias
    )
    generator = np.random.default_rng(seed)
    y0 = (generator.random((count, widths[0])) < 0.2).astype(np.float32)
    y0[generator.integers(count, size=count // 3)] = y0[0]
    families = data.draw(st.sampled_from(SIDE_BY_SIDE))
    plan = build_plan(network, kernel="chain" if "chain" in families else "staged", compress=compress)
    steps = data.draw(schedules(plan.layers, families, compress == "full"))
    result = emulator.run(plan, y0, steps=steps, activations=activations)
    check(result, network, y0)
    if compress == "none":
        for end, active in enumerate(result.active, 1):
            part = SparseNetwork(network.layers[:end], network.activation[:end])
            expected = oracle.infer(part, y0, errors=True)
            assert abs(active - expected.active[-1]) <= expected.close_calls.sum()


# --- equal features ---------------------------------------------------------------------------------------------------


def equal_at_once(widths: Sequence[int]) -> tuple[SparseNetwork, np.ndarray]:
    """A network whose layers saturate all their outputs at the cap, for features that are not small."""
    layers = [
        SparseLayer.from_dense(np.full((inputs, outputs), 5.0), bias=-1.0)
        for inputs, outputs in itertools.pairwise(widths)
    ]
    y0 = np.random.default_rng(0).random((100, widths[0]), np.float32)
    y0[::7] = 0
    return SparseNetwork(tuple(layers)), y0


def search_after(layer: int, layers: int) -> list[planner.Step]:
    halves = [planner.Step("resident", 0, layer), planner.Step("resident", layer, layers)]
    return [halves[0], planner.Step("equal features", layer, layer), halves[1]]


def test_equal_features_are_counted_and_answered_for(emulator: emulate.Emulator) -> None:
    """All survivors are equal after one layer: one goes on, all others get its result and are counted."""
    network, y0 = equal_at_once([20, 30, 25, 10])
    plan = build_plan(network, compress="full", kernel="resident")
    result = emulator.run(plan, y0, steps=search_after(1, 3))
    check(result, network, y0)
    np.testing.assert_array_equal(result.active, [85, 85, 85])


@pytest.mark.parametrize("family", ["grouped", "staged"])
def test_equal_features_among_survivors(emulator: emulate.Emulator, family: planner.Action) -> None:
    """Where features have died, the survivors do not stand at their own numbers."""
    generator = np.random.default_rng(0)
    y0 = (generator.random((150, 256)) < generator.random((150, 1))).astype(np.uint8)
    y0[100:] = y0[:50]
    network = SparseNetwork(tuple(radixnet.layers(256, 8)))
    expected = oracle.infer(network.layers, y0)
    assert len(set(expected.active)) > 3, "they die layer by layer"
    plan = build_plan(network, compress="full", kernel="staged")
    steps = [planner.Step(family, layer, layer + 1) for layer in range(8)]
    for layer in (5, 3, 1):
        steps.insert(layer, planner.Step("equal features", layer, layer))
    result = emulator.run(plan, y0, steps=steps)
    check(result, network, y0)
    np.testing.assert_array_equal(result.active, expected.active)


@pytest.mark.parametrize("activations", [True, False])
def test_collisions_cost_time_and_no_result(colliding: emulate.Emulator, activations: bool) -> None:
    """Features of one hash are compared value by value: none may get another's result."""
    network = random_network(11, [40, 600, 30, 20], bias="scalar")
    plan = build_plan(network, compress="full", kernel="resident")
    y0 = np.random.default_rng(3).random((90, 40), np.float32)
    y0[50:60] = y0[:10]
    y0[60] = y0[0]
    y0[60, 17] = np.nextafter(y0[0, 17], np.float32(2))  # equal but for one value's last bit
    steps = search_after(1, 3)
    check(colliding.run(plan, y0, steps=steps, activations=activations), network, y0)


def test_signed_zeros(emulator: emulate.Emulator) -> None:
    """-0.0 and 0.0 differ as bits and agree as values: whether they are merged or not, the result is the same."""
    network = random_network(2, [30, 30, 30], bias="negative")
    y0 = (np.random.default_rng(0).random((40, 30)) < 0.3).astype(np.float32)
    y0[20:] = np.where(y0[:20] == 0, np.float32(-0.0), y0[:20])
    plan = build_plan(network, compress="full", kernel="grouped")
    steps = [planner.Step("grouped", 0, 1), planner.Step("equal features", 1, 1), planner.Step("grouped", 1, 2)]
    check(emulator.run(plan, y0, steps=steps), network, y0)


def test_the_planner_s_own_searches(emulator: emulate.Emulator) -> None:
    """A deep network is searched where the planner says; the result is that of a run without."""
    network = random_network(5, [40] * 41, density=1.0, bias="scalar")
    y0 = np.random.default_rng(0).random((50, 40), np.float32)
    y0[25:] = y0[:25]
    plain, merging = (build_plan(network, compress=compress) for compress in ("none", "full"))
    assert sum(step.action == "equal features" for step in planner.schedule(merging.table).steps) == 3
    expected, result = emulator.run(plain, y0), emulator.run(merging, y0)
    np.testing.assert_array_equal(result.activations, expected.activations)
    np.testing.assert_array_equal(result.active, expected.active)
