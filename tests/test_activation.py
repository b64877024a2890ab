"""Activations: what a Clip refuses, and that every way to run a network clips each layer as it says."""

import gzip
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.trained_network import trained_network
from spdnn_jax import Clip, Plan, SparseLayer, SparseNetwork, build_plan, categories, infer, layer, ops
from spdnn_jax.activation import paired, resolve
from spdnn_jax.distributed import mesh
from spdnn_jax.graph_challenge import oracle
from spdnn_jax.simplify import COMPRESS, Compress
from tests.conftest import dense_reference, random_network

EYE = SparseLayer.from_dense(np.eye(4))
NETWORKS = {
    "hard tanh": (Clip(-1, 1), Clip(-1, 1), Clip(-1, 1)),
    "ReLU6": (Clip.relu(6), Clip.relu(6), Clip.relu(6)),
    "logits": (Clip.relu(32), Clip.relu(32), Clip.identity()),
    "linear": (Clip.identity(), Clip.identity(), Clip.identity()),
    "mixed": (Clip(0.25, 3), Clip(-2, -1), Clip.relu(0.5)),
}


def test_the_family() -> None:
    assert Clip.relu() == Clip(0, math.inf)
    assert Clip.relu(32) == Clip(-0.0, 32)
    assert Clip.identity() == Clip(-math.inf, math.inf)
    assert hash(Clip(0.1, 1)) == hash(Clip(float(np.float32(0.1)), 1)), "bounds are those of float32"
    assert not jax.tree.structure(Clip(0, 1)).num_nodes - 1, "a static leaf, not a container of arrays"


@pytest.mark.parametrize(
    ("lower", "upper", "message"),
    [
        (math.nan, 1, "lower must be a number of float32"),
        (0, math.nan, "upper must be a number of float32"),
        (0, 1e39, "upper must be a number of float32, or infinite for none; got 1e"),
        (-(10**400), 0, "lower must be a number of float32"),
        (1, 1, "must lie below the upper one"),
        (1, 1 + 1e-12, "must lie below the upper one"),
        (2, 1, "must lie below the upper one, as float32; got 2.0 and 1.0"),
        (math.inf, math.inf, "must lie below the upper one"),
        (np.zeros(3), 1, "lower must be a number that is known when the program is written"),
        (0, jnp.float32(1), "upper must be a number that is known when the program is written"),
        (None, 1, "lower must be a number"),
        (0, "6", "upper must be a number"),
        (False, True, "lower must be a number"),
    ],
)
def test_bounds_that_are_refused(lower: float, upper: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(lower, upper)


def test_traced_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="known when the program is written"):
        jax.jit(lambda cap: layer(EYE, jnp.ones((1, 4)), cap=cap))(1.0)


ENTRIES = {
    "SparseNetwork": lambda **how: SparseNetwork([EYE], **how),
    "build_plan": lambda **how: build_plan([EYE], **how),
    "layer": lambda **how: layer(EYE, jnp.ones((1, 4)), **how),
    "oracle": lambda **how: oracle.infer([EYE], np.ones((1, 4)), **how),
}


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("cap", [0.0, -1.0, 1e-60])
def test_cap_must_be_positive(entry: str, cap: float) -> None:
    with pytest.raises(ValueError, match="cap must be positive, or None for none"):
        ENTRIES[entry](cap=cap)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("cap", [math.nan, np.ones(4, np.float32), jnp.float32(6), "6", True])
def test_cap_must_be_a_number(entry: str, cap: object) -> None:
    with pytest.raises(ValueError, match="cap must be a number"):
        ENTRIES[entry](cap=cap)


@pytest.mark.parametrize("entry", ENTRIES)
@pytest.mark.parametrize("activation", [jax.nn.relu, "relu", 6.0, [Clip.relu(), None], (0, 1)])
def test_what_is_no_activation_is_named(entry: str, activation: object) -> None:
    with pytest.raises(ValueError, match=r"must be a Clip, such as Clip\.relu\(\) or Clip\.identity\(\); got"):
        ENTRIES[entry](activation=activation)


@pytest.mark.parametrize("entry", ENTRIES)
def test_activation_and_its_short_form_exclude_each_other(entry: str) -> None:
    with pytest.raises(ValueError, match="cap is short for"):
        ENTRIES[entry](activation=Clip.relu(), cap=None)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_activations_are_as_many_as_layers(count: int) -> None:
    for entry in (SparseNetwork, build_plan, oracle_of_iterable):
        with pytest.raises(ValueError, match=f"{count} activations were given, but there are"):
            entry([EYE, EYE], activation=[Clip.relu()] * count)
    with pytest.raises(ValueError, match="one layer has one activation"):
        layer(EYE, jnp.ones((1, 4)), activation=[Clip.relu()])  # pyright: ignore[reportArgumentType]


def oracle_of_iterable(layers: list[SparseLayer], activation: list[Clip]) -> oracle.Result:
    return oracle.infer(iter(layers), np.ones((1, 4)), activation=activation)


def test_a_network_has_its_own_activations() -> None:
    with pytest.raises(ValueError, match="has its own activations"):
        build_plan(SparseNetwork([EYE]), cap=1.0)


def test_the_default_is_the_challenge_s() -> None:
    assert resolve(None, ...) == Clip.relu(32)
    assert resolve(None, None) == Clip.relu()
    assert [clip for _, clip in paired("ab", (Clip.relu(), Clip.identity()))] == [Clip.relu(), Clip.identity()]


# --- what is computed -------------------------------------------------------------------------------------------------


def assert_close(got: jax.Array, expected: np.ndarray) -> None:
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-5 * max(1.0, np.abs(expected).max()))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(("backend", "compress"), [*(("auto", compress) for compress in COMPRESS), ("xla", "none")])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str, backend: ops.Backend, compress: Compress) -> None:
    network = random_network(3, [20, 14, 12, 10], activation=NETWORKS[name], density=1)
    y0 = np.random.default_rng(0).random((150, 20), np.float32)
    y0[::3] = 0
    expected = dense_reference(network, y0)
    plan = build_plan(network, compress=compress)
    assert plan.activation == network.activation
    assert_close(infer(plan, y0, backend=backend), expected)
    np.testing.assert_array_equal(categories(plan, y0, backend=backend), expected.any(axis=1))
    y = jnp.asarray(y0)
    for sparse_layer, clip in zip(network.layers, network.activation, strict=True):
        y = layer(sparse_layer, y, activation=clip, backend=backend)
    assert_close(y, expected)


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_outputs_below_zero_are_active(backend: ops.Backend) -> None:
    network = SparseNetwork([SparseLayer.from_dense(-np.eye(4))], Clip(-1, 1))
    y0 = np.zeros((3, 4), np.float32)
    y0[1, 2] = 0.5
    alive, active = ops.categories_and_active(build_plan(network), y0, backend=backend)
    np.testing.assert_array_equal(alive, [False, True, False])
    np.testing.assert_array_equal(active, [1])


@pytest.mark.parametrize(
    ("activation", "biases", "prunable"),
    [
        (Clip.relu(), [-1, -1, -1], [1, 1, 1]),
        (Clip(-1, 1), [-1, -1, -1], [0, 0, 1]),
        (Clip(-1, 1), [-1, 0, 0], [1, 1, 1]),
        (Clip.identity(), [0, 0, -1e-30], [0, 0, 1]),
        (Clip(-1, 0), [0.5, 0.5, 2], [1, 1, 1]),
        (Clip(-1, 0), [0.5, -0.5, 2], [0, 1, 1]),
        (Clip(0.5, 1), [0, 0, 0], [0, 0, 1]),
        (Clip(-2, -1), [0, 0, 0], [0, 0, 1]),
        ((Clip.relu(), Clip.relu(), Clip.identity()), [-1, -1, -1], [0, 0, 1]),
        ((Clip.identity(), Clip.relu(), Clip.relu()), [-1, -1, -1], [1, 1, 1]),
    ],
)
def test_features_may_die_only_where_zero_stays_zero(
    activation: Clip | tuple[Clip, ...], biases: list[float], prunable: list[int]
) -> None:
    network = SparseNetwork([SparseLayer.from_dense(np.eye(4), bias) for bias in biases], activation)
    plan = build_plan(network)
    assert plan.table.layers["prunable"].tolist() == prunable
    y0 = np.zeros((40, 4), np.float32)
    y0[::5] = 3
    expected = oracle.infer(network, y0)
    np.testing.assert_array_equal(infer(plan, y0), dense_reference(network, y0))
    np.testing.assert_array_equal(expected.activations, dense_reference(network, y0))
    np.testing.assert_array_equal(ops.categories_and_active(plan, y0)[1], expected.active)
    wakes = dense_reference(network, np.zeros((1, 4))).any() or 0 in prunable
    assert mesh.zero_stays_zero(plan.table) == (
        not wakes and not dense_reference(SparseNetwork(network.layers[:1], network.activation[:1]), y0[1:2]).any()
    )


def test_rows_of_many_biases_are_all_looked_at() -> None:
    """One bias that the activation does not clip to zero is enough."""
    last = SparseLayer.from_dense(np.eye(4), [-1, -1, 1e-3, -1])
    for activation, prunable in ((Clip.relu(), 0), (Clip(-1, 0), 0), (Clip.relu(), 0)):
        assert build_plan([EYE, last], activation=activation).table.layers["prunable"][0] == prunable
    assert build_plan([EYE, SparseLayer.from_dense(np.eye(4), [-1, 0, -2, 0])], cap=1).table.layers["prunable"][0]


@pytest.mark.parametrize("parts", [1, 2])
def test_saved_and_cut_plans_keep_them(tmp_path: Path, parts: int) -> None:
    network = random_network(3, [20, 30, 25, 10], activation=NETWORKS["logits"])
    plan = build_plan(network)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again.activation == network.activation
    y0 = np.random.default_rng(0).random((9, 20), np.float32)
    y = jnp.asarray(y0)
    for part in again.split(parts):
        y = infer(part, y)
    assert_close(y, dense_reference(network, y0))
    assert (np.asarray(y) < 0).any(), "without logits below zero this would prove nothing"


def test_older_plans_are_refused_with_what_to_do() -> None:
    words = np.asarray(build_plan([EYE]).words).copy()
    words[:2].view(np.int64)[0] = 3
    with pytest.raises(ValueError, match="version 3, this package reads version 4: build the plan again"):
        Plan.from_words(words)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (math.nan, 1.0)])
def test_plans_with_impossible_bounds_are_damaged(bounds: tuple[float, float]) -> None:
    plan = build_plan([EYE])
    words = np.asarray(plan.words).copy()
    (position,) = np.flatnonzero(words.view(np.float32) == 32)
    words[position - 1 : position + 1] = np.asarray(bounds, np.float32).view(np.uint32)
    with pytest.raises(ValueError, match="layer 1: a layer's activation is malformed"):
        Plan.from_words(words)


@pytest.mark.usefixtures("on_cpu")
def test_gradients_stop_where_a_bound_is_reached() -> None:
    network = SparseNetwork([EYE, EYE], (Clip(-1, 1), Clip.identity()))
    y = jnp.asarray([[-2.0, -0.5, 0.5, 2.0]])
    plan = build_plan(network, derivatives=True)
    for run in (lambda y: infer(plan, y), lambda y: layer(EYE, y, activation=Clip(-1, 1))):
        np.testing.assert_array_equal(jax.grad(lambda y, run=run: run(y).sum())(y), [[0, 1, 1, 0]])


def mnist(folder: Path, name: str) -> np.ndarray:
    offset = 16 if "images" in name else 8
    return np.frombuffer(gzip.decompress((folder / f"{name}-ubyte.gz").read_bytes()), np.uint8, offset=offset)


def accuracy(shared_data: Path) -> int:
    network = trained_network(shared_data / "trained" / "mnist-128x18.tar.gz")
    images = mnist(shared_data / "mnist", "t10k-images-idx3").reshape(-1, 784).astype(np.float32) / 255
    labels = mnist(shared_data / "mnist", "t10k-labels-idx1")
    return int((infer(build_plan(network), images).argmax(axis=1) == labels.astype(np.int32)).sum())


@pytest.mark.usefixtures("on_cpu")
def test_a_trained_network_classifies_as_published(shared_data: Path) -> None:
    """Its last layer has no activation: clipped, 9,476 would be right."""
    assert accuracy(shared_data) == 9494


@pytest.mark.usefixtures("cuda")
def test_a_trained_network_classifies_as_published_on_a_gpu(shared_data: Path) -> None:
    assert accuracy(shared_data) == 9494
