"""Plans: the layout that the native builder makes, saving, and what is said of layers that do not fit."""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from benchmarks.patterns import PATTERNS
from benchmarks.random_layers import random_layer as random_rows
from spdnn_jax import Clip, Plan, SparseLayer, SparseNetwork, _native, build_plan, infer, layout, planner
from spdnn_jax._native import core
from spdnn_jax.graph_challenge import radixnet
from tests.conftest import FUZZ, dense_reference, random_network


def test_figures_of_a_challenge_network() -> None:
    plan = build_plan(radixnet.layers(1024, 7))
    assert (plan.layers, plan.inputs, plan.outputs) == (7, 1024, 1024)
    assert set(plan.activation) == {Clip.relu(32)}
    assert plan.edges == 7 * 32768
    np.testing.assert_array_equal(plan.layer_edges, [32768] * 7)
    runs = plan.table.runs
    assert (runs["value_offset"] < 0).all(), "one weight serves all edges: none is stored"
    assert set(runs["group_outputs"]) == {16, 32}, "the last layer of a group has sets of 32 equal outputs"
    assert plan.nbytes < 7 * 1024 * 16, "an index serves a group"
    assert "1024 -> 1024" in plan.summary()


def test_outputs_without_common_inputs_make_groups_of_one() -> None:
    plan = build_plan(random_network(0, [200, 100], density=0.1))
    assert set(plan.table.runs["group_outputs"]) == {1}


@pytest.mark.parametrize("inputs", [256, 1024])
def test_neighbouring_outputs_read_different_banks(inputs: int) -> None:
    """Four outputs side by side read slots that differ modulo 4 most of the time; by chance, two of them would not."""
    generator = np.random.default_rng(0)
    dense = np.zeros((inputs, 128))
    for output in range(128):
        dense[generator.choice(inputs, 32, replace=False), output] = generator.normal(size=32)
    network = SparseNetwork((SparseLayer.from_dense(dense, -0.1),))
    plan = build_plan(network, kernel="resident")
    (run,) = plan.table.runs
    words = np.asarray(plan.words)[run["index_offset"] :][: run["groups"] * run["edges"] // 2]
    slots = words.view(np.uint16).reshape(4, 8, 32, 4)  # slice, chunk, group, edge
    banks = slots.transpose(0, 1, 3, 2).reshape(-1, 4) % 4  # of four groups at one edge
    fullest = np.stack([(banks == bank).sum(axis=1) for bank in range(4)]).max(axis=0)
    assert fullest.mean() < 1.5
    y0 = generator.random((5, inputs), np.float32)
    np.testing.assert_allclose(infer(plan, y0), dense_reference(network, y0), atol=1e-4)


@pytest.mark.parametrize("outputs", [1, 2, 13, 31, 32, 33, 64, 100])
def test_a_set_of_outputs_is_cut_into_powers_of_two(outputs: int) -> None:
    """13 outputs of one set of inputs become groups of 8, 4 and 1; none is padded."""
    network = SparseNetwork((SparseLayer.from_dense(np.ones((3, outputs)), np.arange(outputs) * 0.01),))
    runs = build_plan(network).table.runs
    assert (runs["groups"] * runs["group_outputs"]).sum() == outputs
    assert sorted(np.repeat(runs["group_outputs"], runs["groups"]).tolist(), reverse=True) == [
        *[32] * (outputs // 32),
        *[1 << b for b in range(4, -1, -1) if outputs % 32 & 1 << b],
    ]


def test_indices_are_16_bit_only_where_they_fit() -> None:
    wide, edge = random_network(0, [65537, 3], density=0.001), random_network(0, [65536, 3], density=0.001)
    assert build_plan(wide).table.layers["index_bits"].tolist() == [32]
    assert build_plan(edge).table.layers["index_bits"].tolist() == [16]


@pytest.mark.parametrize(
    ("biases", "prunable"),
    [([-1, -1, -1], [1, 1, 1]), ([-1, 0.5, -1], [0, 1, 1]), ([0.5, 0, 0], [1, 1, 1]), ([-1, -1, 0.1], [0, 0, 1])],
)
def test_features_may_die_only_where_no_later_bias_is_positive(biases: list[float], prunable: list[int]) -> None:
    network = SparseNetwork(tuple(SparseLayer.from_dense(np.eye(4), bias) for bias in biases))
    assert build_plan(network).table.layers["prunable"].tolist() == prunable


def test_long_rows_are_padded_little() -> None:
    """Rows of many lengths must neither make a run each nor be padded to the longest."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(0, 5000, 400)
    dense = np.zeros((5000, 400))
    for column, length in enumerate(lengths):
        dense[generator.choice(5000, length, replace=False), column] = generator.normal(size=length)
    plan = build_plan(SparseNetwork((SparseLayer.from_dense(dense, -0.1),)))
    runs = plan.table.runs
    assert len(runs) < 100
    stored = (runs["groups"] * runs["edges"] * runs["group_outputs"]).sum()
    assert stored < 1.13 * plan.edges + 4 * 400


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_threads_do_not_change_the_plan(threads: int) -> None:
    network = random_network(3, [50, 60, 70, 40, 30, 50], grouped=4)
    np.testing.assert_array_equal(build_plan(network, threads=threads).words, build_plan(network, threads=3).words)


def test_progress_counts_layers() -> None:
    seen: list[int] = []
    build_plan(radixnet.layers(64, 5), progress=seen.append)
    assert seen == [1, 2, 3, 4, 5]


def test_bad_layers_are_named() -> None:
    good = SparseLayer.from_dense(np.ones((4, 4)))
    nan = SparseLayer(good.indptr, good.indices, np.full(16, np.nan, np.float32), good.bias, 4)
    outside = SparseLayer(good.indptr, np.asarray(good.indices) + 1, good.values, good.bias, 4)
    falling = SparseLayer(good.indptr, np.asarray(good.indices)[::-1], good.values, good.bias, 4)
    narrow = SparseLayer.from_dense(np.ones((3, 4)))
    short = SparseLayer(good.indptr, good.indices, np.ones(5, np.float32), good.bias, 4)
    with pytest.raises(ValueError, match="layer 2: weight 0 is not finite"):
        build_plan([good, nan])
    with pytest.raises(ValueError, match="layer 3: output neuron 0 reads input neuron 4, but there are 4"):
        build_plan([good, good, outside])
    with pytest.raises(ValueError, match="layer 1: the inputs of output neuron 0 are not ascending"):
        build_plan([falling])
    with pytest.raises(ValueError, match="layer 2: has 3 inputs, but the layer before has 4 outputs"):
        build_plan([good, narrow])
    with pytest.raises(ValueError, match=r"layer 1: values must have shape \(\) or \(16,\), got \(5,\)"):
        build_plan([short])
    with pytest.raises(ValueError, match="at least one layer"):
        build_plan([])
    with pytest.raises(ValueError, match="cap must be positive"):
        build_plan([good], cap=-1)


def test_a_failing_source_of_layers_is_heard() -> None:
    """The builder's threads must not swallow, or wait for ever on, an error of the iterator."""

    def breaks() -> object:
        yield SparseLayer.from_dense(np.ones((4, 4)))
        raise OSError("disk on fire")

    with pytest.raises(OSError, match="disk on fire"):
        build_plan(breaks())  # pyright: ignore[reportArgumentType]


def test_save_and_load(tmp_path: Path) -> None:
    network = random_network(1, [20, 30, 10], cap=1.0)
    plan = build_plan(network)
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert again.table == plan.table
    y0 = np.random.default_rng(0).random((9, 20), np.float32)
    np.testing.assert_allclose(infer(again, y0), dense_reference(network, y0), atol=1e-5)
    (tmp_path / "other").write_bytes(b"something else")
    with pytest.raises(ValueError, match="not a plan file"):
        Plan.load(tmp_path / "other")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda words: words[:-4], "holds .* words, its header says"),
        (lambda words: words[:20], "cut short"),
        (lambda words: words[:3], "not a plan"),
        (lambda words: np.concatenate([words[:2], [0, 0], words[4:]]).astype(np.uint32), "announces no layers"),
        (lambda words: np.concatenate([[99, 0], words[2:]]).astype(np.uint32), "version 99"),
    ],
)
def test_damaged_words_are_refused(damage: object, message: str) -> None:
    words = np.asarray(build_plan(random_network(1, [20, 30, 10])).words)
    with pytest.raises(ValueError, match=message):
        Plan.from_words(damage(words))  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(("bits", "widths"), [(16, [20, 30, 10]), (32, [65537, 30, 10])])
def test_indices_and_slots_out_of_range_are_named(tmp_path: Path, bits: int, widths: list[int]) -> None:
    """The back ends trust a plan's indices: a damaged file must not make them read elsewhere."""
    plan = build_plan(random_network(1, widths, density=0.01 if bits == 32 else 0.3))
    words, table = np.asarray(plan.words), plan.table
    assert table.layers["index_bits"][0] == bits
    run = table.runs_of(1)[-1]
    last = int(run["index_offset"] + run["groups"] * run["edges"] // 2) - 1  # layer 2 has indices of 16 bits
    first = int(table.runs_of(0)[-1]["index_offset"])
    slots = int(table.header["slot_offset"])
    for position, value, message in (
        (first, widths[0], "layer 1: an index names an input that the layer does not have"),
        (last, 30 << 16, "layer 2: an index names an input that the layer does not have"),
        (slots + 9, 10, "layer 2: the output order names a slot that does not exist"),
        (slots, 0xFFFFFFFF, "layer 2: the output order names a slot that does not exist"),
    ):
        damaged = words.copy()
        damaged[position] = value
        with pytest.raises(ValueError, match=message):
            Plan.from_words(damaged)
        Plan(damaged, table).save(tmp_path / "plan")  # pyright: ignore[reportArgumentType]: checksums and all
        for use in (lambda path: Plan.load(path), lambda path: list(Plan.open(path).split(1))):
            with pytest.raises(
                ValueError, match=f"^{tmp_path}/plan: the plan is damaged: .*names a.*: build it again$"
            ):
                use(tmp_path / "plan")


def test_no_damaged_word_crashes_the_back_end() -> None:
    """Whatever a damaged word says, the plan is refused, or runs, to some result."""
    network = random_network(5, [20, 30, 30, 10], grouped=3)
    words = np.asarray(build_plan(network).words)
    generator = np.random.default_rng(0)
    refused = 0
    for position in range(words.size):
        damaged = words.copy()
        damaged[position] ^= np.uint32(1 << generator.integers(32))
        try:
            plan = Plan.from_words(damaged)
        except ValueError:
            refused += 1
            continue
        assert infer(plan, np.ones((3, 20), np.float32)).shape == (3, 10)
    assert 0 < refused < words.size


def edited(plan: Plan, edit: Callable[[layout.PlanTable], None]) -> Plan:
    """The plan with other records, as a caller may hand them to the custom call past all checks of Python."""
    table = layout.PlanTable(np.asarray(plan.words))
    edit(table)
    parts = (np.atleast_1d(table.header), table.layers, table.runs)
    table.records = np.concatenate([part.view(np.int64) for part in parts])
    table._digest = table.records.tobytes()
    return Plan(plan.words, table)


RUN_FIELDS = [name for name, _ in core.run_fields() if name != "value"]
LIES = [  # of which kind the record is, its field, and what it says
    *itertools.product(["runs"], RUN_FIELDS, (-1, 2, 16, 1 << 30, 1 << 40, -(1 << 62))),
    *itertools.product(
        ["layers"],
        ("first_word", "words", "runs", "first_run", "bias_offset", "index_bits", "outputs"),
        (0, 8, 32, 1 << 40, -(1 << 62)),
    ),
]
PLACES = {"runs": 0, "layers": 1}  # which record of a kind lies


@functools.cache
def honest() -> Plan:
    return build_plan(random_network(1, [20, 30, 10]))


def lying(kind: str, name: str, value: int) -> Plan:
    assert getattr(honest().table, kind)[name][PLACES[kind]] != value
    return edited(honest(), lambda table: getattr(table, kind)[name].__setitem__(PLACES[kind], value))


@pytest.mark.parametrize(("kind", "name", "value"), LIES)
def test_native_code_refuses_records_that_lie(kind: str, name: str, value: int, on_cpu: None) -> None:
    """A record that was changed must end in an error, not in a read outside the plan or a result of other edges."""
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match=r"spdnn_jax: .*(plan|layer|run)"):
        jax.block_until_ready(infer(lying(kind, name, value), jnp.zeros((1, 20))))


@pytest.mark.parametrize(("kind", "name", "value"), LIES)
def test_nothing_is_planned_by_records_that_lie(kind: str, name: str, value: int) -> None:
    """Launches and the memory of a CUDA call are planned before native code sees the records."""
    wrong = lying(kind, name, value)
    with pytest.raises(ValueError, match=r"the plan is damaged: layer [12]: .*: build it again"):
        planner.schedule(wrong.table)
    if _native.has_cuda_library():
        with pytest.raises(ValueError, match="the plan is damaged: layer"):
            jax.jit(infer).trace(wrong, jnp.zeros((1, 20))).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("widths", [[20, 30, 10], [65537, 30, 10]])
def test_words_changed_in_memory_are_refused(widths: list[int], on_cpu: None) -> None:
    """JAX lets anyone map over a plan's leaf; an index must then not name what does not exist."""
    plan = build_plan(random_network(1, widths, density=0.01 if widths[0] > 65536 else 0.3))
    y0 = np.ones((200, widths[0]), np.float32)
    for fill in (0xFFFFFFFF, 0x00FF00FF, 0x7F800000):
        changed = jax.tree.map(lambda leaf, fill=fill: jnp.full_like(leaf, fill), plan)
        with pytest.raises(jax.errors.JaxRuntimeError, match="words were changed since it was built: an index names"):
            jax.block_until_ready(infer(changed, y0))
    slots = int(plan.table.header["slot_offset"])
    changed = Plan(plan.words.at[slots].set(10), plan.table)
    with pytest.raises(jax.errors.JaxRuntimeError, match="the output order names a slot that does not exist"):
        jax.block_until_ready(infer(changed, y0))


def test_no_flipped_bit_of_a_file_changes_a_result(tmp_path: Path) -> None:
    """Bytes of a small plan's file with one bit flipped: refused, or the plan as it was, to the last word."""
    path = tmp_path / "plan"
    plan = build_plan(random_network(5, [6, 9, 5], grouped=3))
    plan.save(path)
    whole = path.read_bytes()
    expected = np.asarray(plan.words)
    generator = np.random.default_rng(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    used = len(whole[:header].rstrip())
    positions = [*range(used), *generator.integers(used, header, 20), *range(header, len(whole))]  # spaces are alike
    positions = positions[:: 1 if FUZZ else 8]
    refused = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            again = Plan.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        np.testing.assert_array_equal(again.words, expected)
    assert refused > 0.9 * len(positions)
    for size in (0, 7, 100, header - 1, header, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="not a plan file"):
            Plan.load(path)


def test_a_mapped_plan_is_checked_as_it_is_read(tmp_path: Path) -> None:
    """Damage in layer 2 is found when layer 2 is read, by that name, in pieces or as a whole; never run."""
    plan = build_plan(random_network(5, [20, 30, 30, 10], grouped=3))
    path = tmp_path / "plan"
    plan.save(path)
    content = bytearray(path.read_bytes())
    start = content.index(np.asarray(plan.words)[: plan.table.layers["first_word"][0]].tobytes())
    content[start + 4 * int(plan.table.runs_of(1)["index_offset"][0])] ^= 64
    path.write_bytes(content)
    damaged = Plan.open(path)
    y0 = np.ones((3, 20), np.float32)
    first = infer(damaged.cut(0, 1), y0)
    np.testing.assert_array_equal(first, infer(plan.cut(0, 1), y0))
    for use in (lambda: damaged.cut(1, 2), lambda: infer(damaged, y0), lambda: Plan.load(path)):
        with pytest.raises(ValueError, match=f"^{path}: layer 2 is damaged, its checksum differs"):
            use()


def test_a_mapped_plan_runs_as_it_is(tmp_path: Path) -> None:
    plan = build_plan(random_network(5, [20, 30, 30, 10], grouped=3))
    plan.save(tmp_path / "plan")
    y0 = np.random.default_rng(0).random((9, 20), np.float32)
    np.testing.assert_array_equal(infer(Plan.open(tmp_path / "plan"), y0), infer(plan, y0))


@pytest.mark.parametrize("read", [Plan.load, Plan.open])
def test_paths_that_are_no_plan_are_named(tmp_path: Path, read: Callable[[Path], Plan]) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")
    safetensors.numpy.save_file({"words": np.zeros(100, np.uint32)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"other: not a plan file of this version.*write it again with Plan\.save"):
        read(tmp_path / "other")


def test_a_plan_is_one_argument() -> None:
    """1,920 layers must not become 10,000 arguments of a jitted function."""
    layers = list(radixnet.layers(64, 1920))
    plan = build_plan(layers)
    assert len(jax.tree.leaves(plan)) == 1
    assert hash(plan.table) == hash(build_plan(layers).table)
    assert plan.table != build_plan(layers[:-1]).table


@pytest.mark.parametrize("layers", [1, 2, 3, 9])
@pytest.mark.parametrize("one_value", [True, False])
@pytest.mark.parametrize("bias", ["vector", "scalar"])
def test_parts_of_a_plan_compute_what_the_whole_does(layers: int, one_value: bool, bias: str) -> None:
    """Offsets and the order of neurons must survive the cuts, whatever lies in the sections."""
    network = random_network(4, [45, 133, 70, 64, 21], bias=bias, one_value=one_value, grouped=3)
    plan = build_plan(network)
    y0 = np.random.default_rng(0).random((20, 45), np.float32)
    parts = list(plan.split(layers))
    assert sum(part.layers for part in parts) == plan.layers
    np.testing.assert_array_equal(np.concatenate([part.layer_edges for part in parts]), plan.layer_edges)
    y = jnp.asarray(y0)
    for part in parts:
        y = infer(part, y)
    expected = infer(plan, y0)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    assert np.count_nonzero(expected), "an output of zeros would prove nothing"


def test_parts_run_in_plain_xla() -> None:
    plan = build_plan(random_network(4, [45, 133, 21], grouped=3))
    y0 = np.random.default_rng(0).random((20, 45), np.float32)
    first, second = plan.split(1)
    result = infer(second, infer(first, y0, backend="xla"), backend="xla")
    np.testing.assert_allclose(result, infer(plan, y0), atol=1e-5)


def test_parts_of_equal_layers_share_what_is_compiled() -> None:
    """1,920 layers, run one by one, must not be compiled 1,920 times."""
    assert len({part.table for part in build_plan(radixnet.layers(64, 12)).split(1)}) == 2, "two kinds of layer"


def test_a_plan_of_wide_layers_is_cut() -> None:
    """Indices of 32 bits, and sections whose sizes are no multiple of the alignment."""
    plan = build_plan(random_network(5, [70001, 7, 70001, 3], density=0.001))
    y0 = np.random.default_rng(0).random((3, 70001), np.float32)
    y = jnp.asarray(y0)
    for part in plan.split(1):
        y = infer(part, y)
    np.testing.assert_allclose(y, infer(plan, y0), atol=1e-5)


def test_cuts_that_do_not_exist_are_refused() -> None:
    plan = build_plan(random_network(1, [20, 30, 10]))
    with pytest.raises(ValueError, match="layers of a part must be a whole number from 1 to 2147483647, got 0"):
        plan.split(0)
    for first, end in ((0, 3), (1, 1), (-1, 1)):
        with pytest.raises(ValueError, match="no stretch of a plan of 2 layers"):
            layout.cut(np.asarray(plan.words), plan.table, first, end)


@pytest.mark.parametrize("name", ["32 a row", "uneven rows", "wide", *PATTERNS])
def test_irregular_networks_take_no_more_than_their_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 1.25 times their CSR, and the summary says how many times."""
    monkeypatch.setattr("spdnn_jax.plan.cuda_unavailable_reason", lambda: "no staged sections")
    generator = np.random.default_rng(0)
    row_edges = {
        "32 a row": np.full(1024, 32),
        "uneven rows": generator.integers(1, 500, 1024),
        "wide": generator.integers(1, 64, planner.RESIDENT_WIDTH + 1000),
    }
    if name in row_edges:
        layer = random_rows(generator, len(row_edges[name]), row_edges[name])
    else:
        layer = PATTERNS[name](generator, 1024)
    rows = layer.to_scipy().T.tocsr()
    csr = rows.data.nbytes + rows.indices.astype(np.int32).nbytes + rows.indptr.astype(np.int32).nbytes
    plan = build_plan([layer, layer])
    assert plan.nbytes <= 1.25 * 2 * csr
    assert f"{plan.nbytes / (2 * csr):.2f} times what the network takes in CSR" in plan.summary()
