"""The CUDA kernel families, on a GPU; and what can be tested of them without one."""

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse

from spdnn_jax import (
    Clip,
    Plan,
    SparseLayer,
    SparseNetwork,
    _native,
    apply,
    build_plan,
    categories,
    infer,
    layer,
    ops,
    pack_bits,
    planner,
    trainable,
    with_weights,
)
from spdnn_jax.distributed import pieces
from spdnn_jax.graph_challenge import inputs, oracle, radixnet
from spdnn_jax.simplify import Compress
from tests.conftest import dense_reference, random_network

FAMILIES = ("staged", "grouped", "resident", "chain", "spread")
FUSING = ("resident", "chain", "spread")  # many layers in a launch


def assert_close(got: jax.Array | np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-5 * scale)


# --- without a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not _native.has_cuda_library(), reason="built without CUDA")
@pytest.mark.parametrize("family", FAMILIES)
def test_lowers_to_one_custom_call_with_a_workspace(family: planner.Kernel) -> None:
    plan = build_plan(radixnet.layers(64, 20), kernel=family)
    y0 = jnp.ones((100, 64), jnp.uint8)
    text = jax.jit(ops.categories).trace(plan, y0).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@spdnn_network") == 1
    workspace = _native.cuda_workspace_bytes(plan.table.records, 100)
    assert f"tensor<{workspace}xui8>" in text
    assert workspace >= 2 * 64 * 128 * 4, "two buffers of activations"


def test_schedule_covers_all_layers_in_order() -> None:
    for count in (1, 2, 3, 17, 120, 1920, 9000):
        layers = list(radixnet.layers(32, count))
        for family in FAMILIES if count < 1000 else FUSING:
            steps = planner.schedule(build_plan(layers, kernel=family).table, family).steps
            assert [step.first for step in steps] == [0, *(step.end for step in steps[:-1])]
            assert steps[-1].end == count
            assert all(step.end - step.first == 1 for step in steps) or family in FUSING


def test_the_planner_looks_at_the_width(with_gpu: None) -> None:
    narrow, wide = build_plan(random_network(0, [50, 60])), build_plan(random_network(0, [17000, 6], density=0.01))
    assert planner.schedule(narrow.table).families == ["chain"]
    assert planner.schedule(wide.table).families == ["staged"]
    assert "staged for 1 (wider, fewer than 2 outputs in a row group)" in wide.summary()


def test_a_first_layer_of_bytes_is_not_staged(with_gpu: None) -> None:
    """Bytes are so few that bringing them through shared memory gains nothing; later layers are what they were."""
    table = build_plan(random_network(0, [17000, 300, 17000, 6], density=0.01)).table
    assert planner.schedule(table).families == ["staged"] * 3
    assert planner.schedule(table, narrow_input=True).families == ["grouped", "staged", "staged"]


@pytest.mark.skipif(not _native.has_cuda_library(), reason="built without CUDA")
@pytest.mark.parametrize("compress", ["none", "full"])
def test_the_memory_of_a_call_is_known_before(compress: Compress) -> None:
    """What the summary says, what the handler asks for, and what a run is cut by are one truth."""
    plan, count = build_plan(radixnet.layers(1024, 20), compress=compress), 10_000
    workspace = _native.cuda_workspace_bytes(plan.table.records, count)
    summary = plan.summary(count)
    assert f"{workspace / 2**20:,.1f} MiB of workspace" in summary
    memory = int((plan.nbytes + count * 1024 + workspace) * 1.2)
    fit = pieces.fit(plan.table, count, 1024, 1, memory)
    assert (fit.layers, fit.features) == (plan.layers, count)
    fewer = pieces.fit(plan.table, count, 1024, 1, memory // 2)
    needed = fewer.features * 1024 + _native.cuda_workspace_bytes(plan.table.records, fewer.features)
    assert 0 < fewer.features < count
    assert plan.nbytes + needed < memory // 2


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match="kernel must be one of auto, staged, grouped, resident"):
        build_plan(random_network(0, [5, 6]), kernel="fast")  # pyright: ignore[reportArgumentType]


def test_narrow_layers_that_share_nothing_are_chained() -> None:
    """Whatever the network: here half the outputs of a third one agree in their inputs, which a chain does not use."""
    alone, shared = random_network(0, [50, 60, 40]), random_network(0, [50, 60, 40], grouped=3)
    assert planner.schedule(build_plan(alone).table).families == ["chain"] * 2
    assert planner.schedule(build_plan(shared).table).families == ["resident"] * 2
    between = [*alone.layers, *random_network(1, [40, 40], grouped=8).layers, *random_network(2, [40, 30]).layers]
    families = planner.schedule(build_plan(SparseNetwork(between)).table).families
    assert families == ["resident"] * 4, "launches are not cut for a short chain's sake"
    with pytest.raises(ValueError, match="this plan is no chain"):
        planner.schedule(build_plan(shared).table, "chain")
    assert planner.schedule(build_plan(shared, kernel="chain").table, "chain").families == ["chain"] * 2


def test_few_features_of_many_edges_are_spread() -> None:
    """Where a block alone would be busy long, and there are not so many features that each could have one."""
    many = build_plan(random_network(0, [2000, 2000, 2000], density=0.1)).table
    few = build_plan(random_network(0, [2000, 2000, 2000], density=0.001)).table
    assert planner.schedule(many, features=1).steps == (planner.Step("spread", 0, 2),)
    assert planner.schedule(many, features=64, narrow_input=True).families == ["spread"] * 2
    for table, features in ((many, None), (many, 0), (many, 4000), (few, 1)):
        assert planner.schedule(table, features=features).families == ["chain"] * 2
    assert planner.schedule(few, "spread", features=4000).families == ["spread"] * 2


# --- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8, 31, 32, 33, 127, 128, 129, 1000])
@pytest.mark.parametrize("form", ["float32", "uint8", "packed"])
def test_every_tile_boundary(family: planner.Kernel, count: int, form: str) -> None:
    network = random_network(7, [45, 33, 64, 20], bias="negative", grouped=3)
    plain = np.random.default_rng(count).random((count, 45)) < 0.3
    y0 = pack_bits(plain) if form == "packed" else plain.astype(form)
    plan = build_plan(network, kernel=family)
    expected = dense_reference(network, plain)
    assert_close(infer(plan, y0), expected)
    alive, active = ops.categories_and_active(plan, y0)
    np.testing.assert_array_equal(alive, expected.any(axis=1))
    assert active[-1] == expected.any(axis=1).sum()


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("width", [60, 300, 1000])
@pytest.mark.parametrize("one_value", [False, True])
@pytest.mark.parametrize("count", [2500, 20000])
def test_chains_of_many_features(width: int, one_value: bool, count: int) -> None:
    """More than the launch for few features takes: of narrow layers, and of wider ones."""
    network = random_network(
        9, [width, 70, width, 20], density=0.1, activation=Clip(-1, 2), bias="vector", one_value=one_value
    )
    y0 = np.random.default_rng(width).random((count, width), np.float32)
    plan = build_plan(network, kernel="chain")
    expected = dense_reference(network, y0)
    first = np.asarray(infer(plan, y0))
    assert_close(first, expected)
    for _ in range(20):
        np.testing.assert_array_equal(infer(plan, y0), first)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("form", ["uint8", "packed"])
@pytest.mark.parametrize("width", [1000, 4100, 20000])
@pytest.mark.parametrize("outputs", [1, 4, 16])
def test_a_first_layer_of_wide_rows(width: int, form: str, outputs: int) -> None:
    """128 to 4 of them in a block, of which there are some; rows of more than 256 edges."""
    network = random_network(3, [width, 64, 20], density=0.1, grouped=outputs, one_value=outputs == 1, cap=None)
    plain = np.random.default_rng(0).integers(0, 256, (301, width), np.uint8)
    y0 = pack_bits(plain > 200) if form == "packed" else plain
    plan = build_plan(network, kernel="grouped")
    assert_close(infer(plan, y0), dense_reference(network, plain > 200 if form == "packed" else plain))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("bias", ["vector", "scalar", "negative"])
@pytest.mark.parametrize("one_value", [True, False])
@pytest.mark.parametrize("grouped", [1, 5, 40])
@pytest.mark.parametrize("widths", [[1, 1, 1], [2000, 3, 1500], [100, 333, 77, 500, 9]])
def test_odd_networks(family: planner.Kernel, bias: str, one_value: bool, grouped: int, widths: list[int]) -> None:
    network = random_network(3, widths, bias=bias, one_value=one_value, grouped=grouped, density=0.1)
    y0 = np.random.default_rng(0).random((77, widths[0]), np.float32)
    assert_close(infer(build_plan(network, kernel=family), y0), dense_reference(network, y0))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "activation",
    [
        (Clip(-1, 1),) * 3,
        (Clip.relu(6),) * 3,
        (Clip.relu(32), Clip.relu(32), Clip.identity()),
        (Clip.identity(), Clip.relu(4), Clip(-4, 4)),
        (Clip.relu(0.5), Clip.relu(2), Clip(0.25, 3)),
    ],
    ids=str,
)
def test_activations_side_by_side(family: planner.Kernel, activation: tuple[Clip, ...]) -> None:
    """One unit serves all layers, whatever their bounds; features with negative outputs only are active."""
    network = random_network(3, [160, 150, 140, 30], activation=activation, grouped=2)
    y0 = np.random.default_rng(0).random((300, 160), np.float32)
    expected = dense_reference(network, y0)
    plan = build_plan(network, kernel=family)
    assert_close(infer(plan, y0), expected)
    np.testing.assert_array_equal(categories(plan, y0), expected.any(axis=1))
    for sparse_layer, clip in zip(network.layers, activation, strict=True):
        expected = dense_reference(SparseNetwork([sparse_layer], clip), y0)
        assert_close(layer(sparse_layer, y0, activation=clip), expected)
        y0 = expected.astype(np.float32)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("edges", [0, 1, 5000])
def test_rows_of_any_length(family: planner.Kernel, edges: int) -> None:
    generator = np.random.default_rng(edges)
    inputs = 6000
    dense = np.zeros((inputs, 9))
    dense[generator.choice(inputs, min(edges, inputs), replace=False), 4] = generator.normal() * 0.1
    network = SparseNetwork((SparseLayer.from_dense(dense, -0.01),))
    y0 = generator.random((70, inputs), np.float32)
    assert_close(infer(build_plan(network, kernel=family), y0), dense_reference(network, y0))


@pytest.mark.usefixtures("cuda")
def test_indices_of_32_bits() -> None:
    network = random_network(5, [70001, 50, 70001, 4], density=0.001)
    y0 = np.random.default_rng(0).random((20, 70001), np.float32)
    assert_close(infer(build_plan(network), y0), dense_reference(network, y0))


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("neurons", [1024, 4096])
def test_challenge_networks_give_the_oracle_s_categories(family: planner.Kernel, neurons: int) -> None:
    y0 = inputs.digits(neurons, 2000)
    expected = oracle.infer(radixnet.layers(neurons, 40), y0)
    alive, active = ops.categories_and_active(build_plan(radixnet.layers(neurons, 40), kernel=family), y0)
    np.testing.assert_array_equal(alive, expected.categories)
    assert active[-1] == expected.active[-1]


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", FAMILIES)
def test_same_bits_in_20_runs(family: planner.Kernel) -> None:
    network = random_network(3, [200, 150, 100], bias="negative")
    y0 = np.random.default_rng(0).random((1000, 200), np.float32)
    plan = build_plan(network, kernel=family)
    first = np.asarray(infer(plan, y0))
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(infer(plan, y0)), first)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", ["staged", "grouped"])
def test_offsets_past_32_bits(family: planner.Kernel) -> None:
    """65,536 neurons x 60,000 features are 3.9e9 activations: an index of 32 bits would meet another feature's."""
    memory = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if memory < 45 << 30:
        pytest.skip("needs 45 GiB of device memory")
    neurons, count, kept = 65536, 60000, np.asarray([0, 32767, 32768, 59999])
    identity = scipy.sparse.eye_array(neurons, format="csr")
    network = SparseNetwork((SparseLayer.from_scipy(identity, bias=0.0),) * 3)
    y0 = jnp.zeros((count, neurons), jnp.uint8).at[kept, neurons - 1].set(1)
    alive, active = ops.categories_and_active(build_plan(network, kernel=family), y0)
    np.testing.assert_array_equal(np.flatnonzero(alive), kept)
    np.testing.assert_array_equal(active, [4, 4, 4])


@pytest.mark.usefixtures("cuda")
def test_the_gpu_agrees_with_the_cpu_on_merged_networks() -> None:
    """Equal neurons and features are merged on both: categories are equal, values to rounding."""
    y0 = inputs.digits(256, 500)
    plan = build_plan(radixnet.layers(256, 200), compress="full")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        on_cpu = infer(build_plan(radixnet.layers(256, 200), compress="full"), y0)
    on_gpu = infer(plan, y0)
    np.testing.assert_array_equal(np.any(on_gpu, axis=1), np.any(on_cpu, axis=1))
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=1e-5)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("count", [700, 1000])
def test_derivatives_of_many_features(count: int) -> None:
    """Rows are cut into slices then: the CPU's kernels, which cut nothing, agree, but where a sum is close to zero."""
    network = random_network(3, [2500, 1300, 3000], density=0.02)
    generator = np.random.default_rng(0)
    y, sums = (generator.normal(size=(count, width)).astype(np.float32) for width in (2500, 3000))
    plan, (leaves, structure) = build_plan(network, derivatives=True, precision=None), trainable(network)

    def through_plan(y: jax.Array, plan: Plan) -> jax.Array:
        return (infer(plan, y) * sums).sum()

    def through_network(leaves: Any, y: jax.Array) -> jax.Array:
        return (apply(with_weights(structure, leaves), y) * sums).sum()

    def gradients(plan: Plan) -> Any:
        return jax.jit(jax.grad(through_plan))(y, plan), jax.jit(jax.grad(through_network))(leaves, y)

    found = gradients(plan)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        expected = gradients(build_plan(network, derivatives=True, precision=None))
    for got, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        off = np.abs(np.asarray(got, np.float64) - wanted) > 1e-4 * np.abs(wanted).max()
        assert off.mean() < 5e-3


@pytest.mark.usefixtures("cuda")
def test_too_wide_for_residence_is_said() -> None:
    plan = build_plan(random_network(0, [60000, 3], density=0.001), kernel="resident")
    with pytest.raises(jax.errors.JaxRuntimeError, match="too wide for shared memory"):
        jax.block_until_ready(infer(plan, jnp.zeros((1, 60000))))


@pytest.mark.usefixtures("cuda")
def test_calls_leave_no_device_memory_behind() -> None:
    plan, y0 = build_plan(radixnet.layers(1024, 20)), jax.device_put(inputs.random(1024, 500))
    (part,) = random_network(0, [1024, 300]).layers
    y = jnp.ones((500, 1024))

    def held() -> int:
        jax.block_until_ready([infer(plan, y0), layer(part, y)])
        return (jax.devices()[0].memory_stats() or {})["bytes_in_use"]

    held()  # compiles
    before = held()
    assert [held() for _ in range(100)][-1] == before


SHARER = """
import sys
import jax, numpy as np
from spdnn_jax import build_plan, infer
from spdnn_jax.graph_challenge import inputs, radixnet

plan, y0 = build_plan(radixnet.layers(1024, 30)), inputs.random(1024, 2000)
with jax.default_device(jax.local_devices(backend="cpu")[0]):
    expected = np.asarray(infer(build_plan(radixnet.layers(1024, 30)), y0))
(device,) = jax.local_devices()
print(device.memory_stats()["bytes_limit"], flush=True)
sys.stdin.readline()  # now both hold their share of the memory
for _ in range(50):
    np.testing.assert_allclose(infer(plan, y0), expected, rtol=1e-5)
"""


@pytest.mark.usefixtures("cuda")
def test_two_processes_share_a_gpu() -> None:
    """Each with a part of the memory, taken when it begins: a workspace beside the part would not fit."""
    share = {"XLA_PYTHON_CLIENT_PREALLOCATE": "true", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.04"}
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    processes = [
        subprocess.Popen([sys.executable, "-P", "-c", SHARER], text=True, env=os.environ | share, **pipes)
        for _ in range(2)
    ]
    try:
        limits = [process.stdout.readline() for process in processes if process.stdout]
        errors = [process.communicate("\n", timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    assert all(0 < int(limit) < 12 << 30 for limit in limits), "the fraction was not heeded"
