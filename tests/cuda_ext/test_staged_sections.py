"""The sections of a plan that the staged CUDA kernels read, multiplied with NumPy."""

import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st

from spdnn_jax import Plan, SparseLayer, SparseNetwork, build_plan, planner
from spdnn_jax._native import core
from spdnn_jax.graph_challenge import radixnet
from tests.conftest import dense_reference, random_network

EDGES_OF_CHUNK = 4
STAGE = np.dtype(
    [(name, np.uint32) for name in ("map", "count", "chunks", "indices", "values")] + [("_", np.uint32, 3)]
)


def staged_matrix(plan: Plan, number: int) -> scipy.sparse.csr_array:
    """The weights of a layer, (input slots, output slots), as its staged sections have them."""
    words, layer = np.asarray(plan.words), plan.table.layers[number]
    staged = words[layer["staged_offset"] :]
    blocks = -(-int(layer["outputs"]) // core.STAGED_ROWS)
    stages = words[layer["stage_offset"] :][: int(layer["stages"]) * STAGE.itemsize // 4].view(STAGE)
    result = np.zeros((layer["inputs"], blocks * core.STAGED_ROWS))
    for block in range(blocks):
        for stage in stages[staged[block] : staged[block + 1]]:
            footprint = staged[stage["map"] :][: stage["count"]]
            assert 0 < len(footprint) <= core.STAGED_INPUTS
            assert (np.diff(footprint.astype(np.int64)) > 0).all()
            first_chunks = staged[stage["chunks"] :][: core.STAGED_ROWS + 1].astype(np.int64)
            edges = first_chunks[-1] * EDGES_OF_CHUNK
            indices = staged[stage["indices"] :][: edges // 2].view(np.uint16)
            values = np.full(edges, layer["staged_value"])
            if not layer["staged_single_valued"]:
                values = staged[stage["values"] :][:edges].view(np.float32)
            rows = np.repeat(np.arange(core.STAGED_ROWS), np.diff(first_chunks) * EDGES_OF_CHUNK)
            real = indices != core.STAGED_INPUTS
            np.add.at(result, (footprint[indices[real]], block * core.STAGED_ROWS + rows[real]), values[real])
    assert not result[:, layer["outputs"] :].any()
    return scipy.sparse.csr_array(result[:, : layer["outputs"]])


def multiply(plan: Plan, y0: np.ndarray) -> np.ndarray:
    y, words, header = y0.astype(np.float64), np.asarray(plan.words), plan.table.header
    for number, layer in enumerate(plan.table.layers):
        bias = layer["bias"]
        if layer["bias_offset"] >= 0:
            bias = words[layer["bias_offset"] :][: layer["outputs"]].view(np.float32)
        y = np.clip(y @ staged_matrix(plan, number) + bias, layer["lower"], layer["upper"])
    return y[:, words[header["slot_offset"] :][: header["outputs"]]]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    widths=st.lists(st.sampled_from([1, 2, 31, 100, 512, 513, 900]), min_size=2, max_size=4),
    density=st.sampled_from([0.0, 0.01, 0.3]),
    one_value=st.booleans(),
    grouped=st.sampled_from([1, 3, 40]),
    bias=st.sampled_from(["vector", "scalar", "negative"]),
)
def test_they_hold_the_network(
    seed: int, widths: list[int], density: float, one_value: bool, grouped: int, bias: str
) -> None:
    """Blocks that are not full, stages of every number, rows without edges: each edge once, in the slots' order."""
    network = random_network(seed, widths, density=density, one_value=one_value, grouped=grouped, bias=bias)
    y0 = np.random.default_rng(seed).random((5, widths[0]))
    expected = dense_reference(network, y0)
    got = multiply(build_plan(network, kernel="staged"), y0)
    np.testing.assert_allclose(got, expected, atol=1e-5 * max(1.0, np.abs(expected).max(initial=0)))


def test_long_rows_and_wide_layers() -> None:
    """A row of 5,000 edges takes several stages; indices above 65,536 stand in the map, not in the edges."""
    generator = np.random.default_rng(0)
    weights = scipy.sparse.random_array((70001, 3), density=0.07, rng=generator, dtype=np.float32, format="csr")
    network = SparseNetwork((SparseLayer.from_scipy(weights, bias=-0.1),))
    y0 = generator.random((2, 70001))
    plan = build_plan(network, kernel="staged")
    assert plan.table.layers["stages"][0] > 10
    np.testing.assert_allclose(multiply(plan, y0), dense_reference(network, y0), rtol=1e-5)


def test_only_wide_layers_of_single_outputs_have_them(with_gpu: None) -> None:
    """Sections that no kernel reads would only take memory."""
    above, below = planner.RESIDENT_WIDTH + 1, planner.RESIDENT_WIDTH
    wide, narrow = random_network(0, [above, 600], density=0.01), random_network(0, [below, 600], density=0.01)
    grouped = random_network(0, [above, 600], density=0.01, grouped=4)
    networks = {"wide": wide, "narrow": narrow, "grouped": grouped}
    has = {name: build_plan(network).table.layers["staged_offset"][0] >= 0 for name, network in networks.items()}
    assert has == {"wide": True, "narrow": False, "grouped": False}
    assert build_plan(wide, kernel="grouped").table.layers["staged_offset"][0] == -1
    assert all(build_plan(radixnet.layers(64, 3), kernel="staged").table.layers["staged_offset"] >= 0)


def test_without_a_gpu_they_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spdnn_jax.plan.cuda_unavailable_reason", lambda: "there is none")
    wide = random_network(0, [planner.RESIDENT_WIDTH + 1, 600], density=0.01)
    assert build_plan(wide).table.layers["staged_offset"][0] == -1
    assert build_plan(wide, kernel="staged").table.layers["staged_offset"][0] >= 0


def test_a_plan_without_them_is_not_run_by_their_kernels() -> None:
    plan = build_plan(random_network(0, [50, 60]))
    with pytest.raises(ValueError, match="build it with kernel='staged'"):
        planner.schedule(plan.table, "staged")


def test_parts_keep_them() -> None:
    plan = build_plan(random_network(1, [700, 600, 500, 400], density=0.02), kernel="staged")
    y0 = np.random.default_rng(0).random((3, 700))
    expected = multiply(plan, y0)
    for part in plan.split(2):
        y0 = multiply(part, y0)
    np.testing.assert_allclose(y0, expected, rtol=1e-6)


@pytest.mark.parametrize("field", ["count", "chunks", "indices", "values", "map"])
def test_damaged_stages_are_refused(field: str) -> None:
    """The kernels trust what a stage names: memory outside the plan would be read."""
    plan = build_plan(random_network(1, [700, 600], density=0.02), kernel="staged")
    words = np.asarray(plan.words).copy()
    layer = plan.table.layers[0]
    stage = words[layer["stage_offset"] :][: STAGE.itemsize // 4].view(STAGE)
    stage[field] = 0x7FFFFFFC
    with pytest.raises(ValueError, match="layer 1: a stage reaches outside the layer"):
        Plan.from_words(words)


def test_damaged_edges_are_refused() -> None:
    plan = build_plan(random_network(1, [700, 600], density=0.02), kernel="staged")
    words = np.asarray(plan.words).copy()
    layer = plan.table.layers[0]
    stage = words[layer["stage_offset"] :][: STAGE.itemsize // 4].view(STAGE)[0]
    words[layer["staged_offset"] + stage["indices"]] = 700  # positions 700 and 0: neither the mark nor in the map
    with pytest.raises(ValueError, match="layer 1: a stage reaches outside the layer"):
        Plan.from_words(words)


# --- similarity -------------------------------------------------------------------------------------------------------


def banded(shuffle_inputs: bool) -> SparseNetwork:
    """Each output reads 16 neighbouring inputs; outputs stand in random order, and inputs, if wished."""
    count, width = 6000, 16
    generator = np.random.default_rng(0)
    inputs = (np.arange(count)[:, None] + np.arange(width)) % count
    if shuffle_inputs:
        inputs = generator.permutation(count)[inputs]
    values = generator.normal(size=inputs.size)
    weights = scipy.sparse.coo_array((values, (inputs.ravel(), np.repeat(generator.permutation(count), width))))
    return SparseNetwork((SparseLayer.from_scipy(weights.tocsr(), bias=-0.1),))


def stages_of_a_block(plan: Plan) -> float:
    layer = plan.table.layers[0]
    return float(layer["stages"] / np.ceil(layer["outputs"] / core.STAGED_ROWS))


@pytest.mark.parametrize(("shuffle_inputs", "most"), [(False, 1), (True, 3)])
def test_similar_outputs_stand_together(shuffle_inputs: bool, most: int) -> None:
    """512 outputs in random order read nearly all 6,000 inputs, 6 or more stages; neighbours read 527."""
    network = banded(shuffle_inputs)
    plan = build_plan(network, kernel="staged")
    assert stages_of_a_block(plan) <= most
    y0 = np.random.default_rng(1).random((3, 6000))
    np.testing.assert_allclose(multiply(plan, y0), dense_reference(network, y0), atol=1e-5)
