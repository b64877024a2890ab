"""Few features on the CPU: threads share outputs, lanes are outputs, and no bit differs from larger batches."""

import jax
import numpy as np
import pytest

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, infer, ops, pack_bits
from tests.conftest import random_layer, random_network

MANY = 130
"""Features that are dealt out to threads in tiles."""

KERNELS = ["baseline", "avx2", "avx512"]

pytestmark = pytest.mark.usefixtures("on_cpu")


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a test with each of the kernels that this processor has."""
    monkeypatch.setenv("SPDNN_CPU_KERNELS", request.param)
    try:
        jax.block_until_ready(infer(build_plan(random_network(0, [1, 1])), np.ones((1, 1))))
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # which of them is JAX's choice
        assert "names no kernels that run on this processor" in str(error)
        pytest.skip(f"this processor has no {request.param}")


def uneven_layer(generator: np.random.Generator, inputs: int, outputs: int) -> SparseLayer:
    """Rows of any length, down to none."""
    density = generator.random(outputs) ** 3
    return SparseLayer.from_dense(
        np.where(generator.random((inputs, outputs)) < density, generator.normal(size=(inputs, outputs)), 0), 0.1
    )


def networks() -> dict[str, SparseNetwork]:
    generator = np.random.default_rng(0)
    identity = Clip.identity()
    return {
        "lone outputs": random_network(1, [200, 77, 45, 16, 33], density=0.2, activation=identity),
        "one weight": random_network(2, [64, 96, 48, 31], one_value=True, bias="scalar"),
        **{
            f"groups of {outputs}": random_network(3, [60, 32 * outputs, 70], grouped=outputs, activation=Clip(-1, 2))
            for outputs in (2, 5, 16, 40)
        },
        "groups of one weight": random_network(4, [64, 640, 320, 64], grouped=16, one_value=True),
        "uneven rows": SparseNetwork([uneven_layer(generator, 150, 300), uneven_layer(generator, 300, 90)], identity),
        "32-bit indices": random_network(5, [65600, 60, 65600, 20], density=0.002),
        "work for many threads": SparseNetwork(
            [random_layer(generator, 900, 900), random_layer(generator, 900, 1100)], Clip.relu()
        ),
        "no inputs": SparseNetwork([SparseLayer.from_dense(np.zeros((0, 5)), np.arange(5) - 2)], identity),
        "no outputs": SparseNetwork([SparseLayer.from_dense(np.zeros((5, 0)))], identity),
    }


NETWORKS = networks()


@pytest.mark.parametrize("name", NETWORKS)
def test_a_result_does_not_depend_on_how_many_features_there_are(name: str, kernels: None) -> None:
    """Bit for bit, at each width of a row of activations: 1, 4, 8, 16, 32 and 64; by the kernels alone."""
    network = NETWORKS[name]
    plan = build_plan(network, precision=None)
    y0 = np.random.default_rng(1).normal(size=(MANY, network.inputs)).astype(np.float32)
    of_many = np.asarray(infer(plan, y0)).view(np.uint32)
    assert of_many.size == 0 or of_many.any()
    for first, count in ((0, 1), (129, 1), (3, 2), (5, 4), (9, 5), (20, 8), (30, 16), (50, 17), (60, 64)):
        few = np.asarray(infer(plan, y0[first : first + count])).view(np.uint32)
        np.testing.assert_array_equal(few, of_many[first : first + count], err_msg=f"{count} features")


@pytest.mark.parametrize("count", [1, 3, 12])
@pytest.mark.parametrize("form", ["uint8", "bool", "packed"])
def test_bytes_and_bits_give_what_floats_give(count: int, form: str) -> None:
    network = random_network(6, [75, 60, 20])
    plain = np.random.default_rng(count).random((count, 75)) < 0.4
    y0 = pack_bits(plain) if form == "packed" else plain.astype(form)
    plan = build_plan(network)
    np.testing.assert_array_equal(infer(plan, y0), infer(plan, plain.astype(np.float32)))


@pytest.mark.parametrize("count", [1, 2, 7, 16, 40])
@pytest.mark.parametrize("bias", ["negative", "scalar"])
def test_features_die_and_are_counted(count: int, bias: str, kernels: None) -> None:
    """Some before the first layer, some later, all in the end: what is left of them is zero."""
    network = random_network(8, [40, 90, 90, 90, 90, 30], density=0.05, bias=bias)
    y0 = np.zeros((count, 40), np.float32)
    y0[1::2] = np.random.default_rng(count).random((count // 2, 40)) < 0.3
    plan = build_plan(network)
    y, alive, active = (np.asarray(result) for result in ops.activations_and_active(plan, y0))
    counts, layer_by_layer = [], y0
    for part in plan.split(1):
        layer_by_layer = np.asarray(infer(part, layer_by_layer))
        counts.append(int(layer_by_layer.any(axis=1).sum()))
    np.testing.assert_array_equal(y, layer_by_layer)
    np.testing.assert_array_equal(alive, y.any(axis=1))
    assert active.tolist() == counts


def test_a_dead_feature_leaves_nothing_of_an_earlier_call() -> None:
    """The result's memory is not cleared by anyone else."""
    plan = build_plan(random_network(9, [30, 30, 30], bias="negative"))
    for _ in range(5):
        assert np.asarray(infer(plan, np.ones((1, 30), np.float32))).any()
        np.testing.assert_array_equal(infer(plan, np.zeros((1, 30), np.float32)), np.zeros((1, 30)))
