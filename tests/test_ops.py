"""layer, infer and categories, against float64, in every form of input, on the native back end and in plain XLA."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, categories, infer, layer, ops, pack_bits
from spdnn_jax.graph_challenge import inputs, oracle, radixnet
from tests.conftest import dense_reference, random_network


def assert_close(got: jax.Array | np.ndarray, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-5 * scale)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    widths=st.lists(st.integers(1, 80), min_size=2, max_size=5),
    count=st.integers(1, 200),
    activation=st.sampled_from([Clip.relu(), Clip.relu(1), Clip.relu(32), Clip(-1, 1), Clip(0.5, 2), Clip.identity()]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    one_value=st.booleans(),
    grouped=st.sampled_from([1, 3, 20]),
    bias=st.sampled_from(["vector", "scalar", "negative"]),
)
def test_any_network_equals_the_oracle(
    seed: int,
    widths: list[int],
    count: int,
    activation: Clip,
    density: float,
    one_value: bool,
    grouped: int,
    bias: str,
) -> None:
    network = random_network(
        seed, widths, activation=activation, density=density, one_value=one_value, grouped=grouped, bias=bias
    )
    y0 = np.random.default_rng(seed).random((count, widths[0])) < 0.2
    expected = oracle.infer(network, y0, errors=True)
    plan = build_plan(network)
    computed = np.asarray(infer(plan, y0))
    assert (np.abs(computed - expected.activations) <= expected.errors).all()
    alive, active = ops.categories_and_active(plan, y0)
    np.testing.assert_array_equal(alive, computed.any(axis=1))
    assert active[-1] == alive.sum()


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 63, 64, 65, 128, 129])
@pytest.mark.parametrize("form", ["float32", "uint8", "bool", "packed"])
def test_every_input_form_and_tile_boundary(count: int, form: str) -> None:
    network = random_network(7, [45, 33, 20], bias="negative")
    plain = np.random.default_rng(count).random((count, 45)) < 0.3
    y0 = pack_bits(plain) if form == "packed" else plain.astype(form)
    plan = build_plan(network)
    expected = dense_reference(network, plain)
    assert_close(infer(plan, y0), expected)
    np.testing.assert_array_equal(categories(plan, y0), expected.any(axis=1))


@pytest.mark.parametrize("bias", ["vector", "negative"])
@pytest.mark.parametrize("grouped", [1, 7])
def test_plain_xla_equals_the_native_back_end(bias: str, grouped: int) -> None:
    network = random_network(11, [20, 40, 40, 10], bias=bias, grouped=grouped)
    y0 = np.random.default_rng(0).random((30, 20), np.float32)
    plan = build_plan(network)
    assert_close(infer(plan, y0, backend="xla"), dense_reference(network, y0))
    for native, xla in zip(
        ops.categories_and_active(plan, y0), ops.categories_and_active(plan, y0, backend="xla"), strict=True
    ):
        np.testing.assert_array_equal(native, xla)


def test_plain_xla_keeps_what_is_not_finite_to_its_edges(on_cpu: None) -> None:
    """Infinity or NaN in one neuron must not reach outputs that have no edge from it, as 0 * infinity would."""
    network = SparseNetwork((SparseLayer.from_dense(np.eye(5)), SparseLayer.from_dense(np.eye(5))), cap=None)
    plan = build_plan(network)
    for wrong in (np.inf, np.nan):
        y0 = np.arange(1, 11, dtype=np.float32).reshape(2, 5)
        y0[0, 0] = wrong
        np.testing.assert_array_equal(np.asarray(infer(plan, y0, backend="xla"))[:, 1:], y0[:, 1:])


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_under_shard_map(backend: ops.Backend, on_cpu: None) -> None:
    """shard_map types arrays by the mesh axes over which they vary: a loop whose start varies less is refused."""
    first, second, last = random_network(0, [12, 12, 12, 8], grouped=4).layers
    edgeless = SparseLayer.from_dense(np.zeros((12, 12)), 0.5)
    network = SparseNetwork((first, edgeless, second, last))
    plan, y0 = build_plan(network), np.random.default_rng(0).random((6, 12), np.float32)
    mesh = Mesh(np.asarray(jax.devices("cpu")[:1]), ("features",))
    spread = jax.shard_map(
        lambda plan, y: infer(plan, y, backend=backend),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("features")),
        out_specs=PartitionSpec("features"),
        check_vma=True,
    )
    np.testing.assert_allclose(jax.jit(spread)(plan, y0), dense_reference(network, y0), atol=1e-5)


def test_plain_xla_reads_wide_layers() -> None:
    network = random_network(2, [65540, 40, 3], density=0.002)
    y0 = np.random.default_rng(0).random((3, 65540), np.float32)
    assert_close(infer(build_plan(network), y0, backend="xla"), dense_reference(network, y0))


@pytest.mark.parametrize("edges", [0, 1, 5000])
def test_rows_of_any_length(edges: int) -> None:
    generator = np.random.default_rng(edges)
    dense = np.zeros((6000, 9))
    dense[generator.choice(6000, edges, replace=False), 4] = generator.normal(size=edges) * 0.1
    network = SparseNetwork((SparseLayer.from_dense(dense, -0.01),))
    y0 = generator.random((70, 6000), np.float32)
    assert_close(infer(build_plan(network), y0), dense_reference(network, y0))


def test_width_beyond_16_bits() -> None:
    network = random_network(5, [70001, 50, 70001, 4], density=0.001)
    y0 = np.random.default_rng(0).random((20, 70001), np.float32)
    assert_close(infer(build_plan(network), y0), dense_reference(network, y0))


def test_challenge_network_gives_the_oracle_s_categories() -> None:
    y0 = inputs.digits(1024, 3000)
    expected = oracle.infer(radixnet.layers(1024, 40), y0)
    alive, active = ops.categories_and_active(build_plan(radixnet.layers(1024, 40)), y0)
    np.testing.assert_array_equal(alive, expected.categories)
    assert active[-1] == expected.active[-1]


def test_dead_features_come_alive_again() -> None:
    """Dropping dead features is right only where no later bias is positive."""
    dies = SparseLayer.from_dense(np.eye(3), bias=-1.0)
    revives = SparseLayer.from_dense(np.eye(3), bias=0.5)
    y0 = np.concatenate([np.zeros((200, 3)), np.full((1, 3), 3.0)]).astype(np.float32)
    network = SparseNetwork((dies, revives, dies))
    alive, active = ops.categories_and_active(build_plan(network), y0)
    np.testing.assert_array_equal(active, [1, 201, 1])
    np.testing.assert_array_equal(np.flatnonzero(alive), [200])


def test_every_result_row_is_written() -> None:
    """Rows of features that died are zeros, whatever the memory held before."""
    network = random_network(9, [50, 40, 30], bias="negative")
    y0 = (np.random.default_rng(1).random((500, 50)) < 0.02).astype(np.uint8)
    expected = dense_reference(network, y0)
    assert (expected == 0).all(axis=1).any()
    plan = build_plan(network)
    for _ in range(3):
        poison = jax.block_until_ready(jnp.full((500, 30), jnp.nan))
        del poison
        assert_close(infer(plan, y0), expected)


def test_same_bits_in_every_run() -> None:
    network = random_network(3, [200, 150, 100], bias="negative")
    y0 = np.random.default_rng(0).random((1000, 200), np.float32)
    plan = build_plan(network)
    first = np.asarray(infer(plan, y0))
    for _ in range(20):
        np.testing.assert_array_equal(np.asarray(infer(plan, y0)), first)


def test_a_feature_s_result_does_not_depend_on_its_neighbours() -> None:
    network = random_network(3, [60, 50, 40], bias="negative")
    y0 = np.random.default_rng(0).random((300, 60), np.float32)
    plan = build_plan(network)
    np.testing.assert_array_equal(infer(plan, y0)[123:124], infer(plan, y0[123:124]))


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize("activation", [Clip.relu(), Clip.relu(1), Clip(-1, 1), Clip.identity()])
@pytest.mark.parametrize("one_value", [True, False])
def test_layer(backend: ops.Backend, activation: Clip, one_value: bool) -> None:
    network = random_network(5, [90, 77], activation=activation, one_value=one_value)
    sparse_layer = network.layers[0]
    if one_value:
        sparse_layer = dataclasses.replace(sparse_layer, values=np.float32(0.25))
    y = np.random.default_rng(0).random((130, 90), np.float32)
    assert_close(layer(sparse_layer, y, activation=activation, backend=backend), dense_reference(network, y))


@pytest.mark.usefixtures("on_cpu")
def test_layer_refuses_indices_out_of_range() -> None:
    good = SparseLayer.from_dense(np.ones((4, 4)))
    bad = dataclasses.replace(good, indices=np.asarray(good.indices) + 1)
    with pytest.raises(ValueError, match="names input 4, but there are 4"):
        layer(bad, jnp.ones((1, 4)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="names an input neuron that does not exist"):
        jax.block_until_ready(jax.jit(layer)(bad, jnp.ones((1, 4))))


def test_wrong_features_are_named() -> None:
    plan = build_plan(random_network(0, [33, 4]))
    with pytest.raises(ValueError, match=r"shape \(features, 33\)"):
        infer(plan, jnp.zeros((2, 32)))
    with pytest.raises(ValueError, match=r"shape \(features, 2\)"):
        infer(plan, jnp.zeros((2, 33), jnp.uint32))
    with pytest.raises(ValueError, match=r"shape \(features, 33\)"):
        infer(plan, jnp.zeros(32))
    with pytest.raises(ValueError, match="backend must be"):
        infer(plan, jnp.zeros((2, 33)), backend="gpu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"shape \(features, 4\)"):
        layer(SparseLayer.from_dense(np.ones((4, 4))), jnp.zeros((2, 5)))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDNN_CPU_KERNELS", kernels)
    network = random_network(13, [100, 90, 33], grouped=5)
    y0 = np.random.default_rng(0).random((150, 100), np.float32)
    plan = build_plan(network)
    try:
        got = jax.block_until_ready(infer(plan, y0))
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # which of them is JAX's choice
        assert "names no kernels that run on this processor" in str(error)
        pytest.skip(f"this processor has no {kernels}")
    assert_close(got, dense_reference(network, y0))


@pytest.mark.usefixtures("on_cpu")
def test_unknown_kernels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPDNN_CPU_KERNELS", "sse9")
    with pytest.raises(jax.errors.JaxRuntimeError, match="SPDNN_CPU_KERNELS names no kernels"):
        jax.block_until_ready(infer(build_plan(random_network(0, [3, 3])), jnp.ones((1, 3))))


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_no_deadlock_with_several_host_devices(devices: int) -> None:
    """Handlers on all devices share one thread pool: waiting for scheduled helpers would hang."""
    program = f"""
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", {devices})
from jax.sharding import Mesh, PartitionSpec as P
from spdnn_jax import build_plan, categories
from spdnn_jax.graph_challenge import inputs, radixnet
plan = build_plan(radixnet.layers(256, 20))
y0 = inputs.random(256, 1024 * {devices}, 0.3)
mesh = Mesh(np.array(jax.devices()), ("features",))
spread = jax.jit(jax.shard_map(categories, mesh=mesh, in_specs=(P(), P("features")), out_specs=P("features")))
expected = np.asarray(categories(plan, y0))
for _ in range(10):
    np.testing.assert_array_equal(spread(plan, y0), expected)
print("agreed on", len(jax.devices()))
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=_cpu_environment(),
        check=False,
    )
    assert done.stdout == f"agreed on {devices}\n", done.stderr


def _cpu_environment() -> dict[str, str]:
    import os

    return os.environ | {"JAX_PLATFORMS": "cpu"}
