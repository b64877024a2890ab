"""The float64 oracle, against dense matrices."""

import dataclasses

import numpy as np
import pytest

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, categories, infer
from spdnn_jax.graph_challenge import oracle
from tests.conftest import dense_reference, random_network


@pytest.mark.parametrize("bias", ["vector", "scalar", "negative"])
@pytest.mark.parametrize(
    "activation", [(Clip.relu(),) * 3, (Clip.relu(1),) * 3, (Clip(-1, 1), Clip(0.5, 2), Clip.identity())]
)
def test_equals_dense_matrices(bias: str, activation: tuple[Clip, ...]) -> None:
    network = random_network(4, [30, 20, 25, 10], activation=activation, bias=bias)
    y0 = np.random.default_rng(0).random((50, 30)) < 0.1
    result = oracle.infer(network, y0)
    np.testing.assert_allclose(result.activations, dense_reference(network, y0), atol=1e-12)
    np.testing.assert_array_equal(result.categories, dense_reference(network, y0).any(axis=1))
    prefixes = [dense_reference(SparseNetwork(network.layers[:k], activation[:k]), y0) for k in (1, 2, 3)]
    np.testing.assert_array_equal(result.active, [(y != 0).any(axis=1).sum() for y in prefixes])


def test_a_positive_bias_brings_dead_features_to_life() -> None:
    """Dropping a dead feature for good is wrong as soon as a later layer has a positive bias."""
    dies = SparseLayer.from_dense(np.eye(2), bias=-1.0)
    revives = SparseLayer.from_dense(np.eye(2), bias=0.5)
    result = oracle.infer(SparseNetwork((dies, revives)), np.array([[0, 0], [3, 0]]))
    np.testing.assert_array_equal(result.active, [1, 2])
    np.testing.assert_allclose(result.activations, [[0.5, 0.5], [2.5, 0.5]])


def test_wrong_arguments_are_named() -> None:
    network = random_network(0, [30, 2])
    with pytest.raises(ValueError, match=r"shape \(features, inputs\), got \(30,\)"):
        oracle.infer(network, np.zeros(30))
    with pytest.raises(ValueError, match="cap must be positive"):
        oracle.infer(network.layers, np.zeros((1, 30)), cap=-1)


def test_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match="layer 1 has 30 inputs, but its input has 7"):
        oracle.infer(random_network(0, [30, 2]), np.zeros((1, 7)))


@pytest.mark.parametrize("cap", [None, 1.0])
@pytest.mark.parametrize("gain", [0.5, 3.0])
def test_errors_bound_those_of_float32(cap: float | None, gain: float) -> None:
    """Through weights that grow what they are given, too; and not by saying nothing."""
    network = random_network(3, [40, 60, 60, 60, 20], cap=cap, density=0.2)
    layers = [dataclasses.replace(layer, values=layer.values * np.float32(gain)) for layer in network.layers]
    network = SparseNetwork(layers, network.activation)
    y0 = np.random.default_rng(0).normal(size=(300, 40)).astype(np.float32)
    result = oracle.infer(network, y0, errors=True)
    assert result.errors is not None
    off = np.abs(np.asarray(infer(build_plan(network), y0)) - result.activations)
    assert (off <= result.errors).all()
    assert off.max() > 0
    assert result.errors.max() < 1e-2 * max(1, result.activations.max())
    assert result.close_calls.mean() < 0.1


def test_categories_of_float32_differ_in_close_calls_alone() -> None:
    """Sums that cancel to nearly nothing, in the last layer and in the one before."""
    generator = np.random.default_rng(0)
    half = generator.normal(size=(50, 1))
    cancels = SparseLayer.from_dense(np.concatenate([half, -half]))
    network = SparseNetwork([cancels, SparseLayer.from_dense(np.ones((1, 2)))], Clip.relu())
    y0 = np.tile(generator.normal(size=(4000, 50)), 2).astype(np.float32)
    y0[:, 50] += np.float32(1e-6) * generator.normal(size=4000).astype(np.float32)
    result = oracle.infer(network, y0, errors=True)
    differs = np.asarray(categories(build_plan(network), y0)) != result.categories
    assert differs.any()
    assert not (differs & ~result.close_calls).any()
    with pytest.raises(ValueError, match="errors=True"):
        _ = oracle.infer(network, y0[:1]).close_calls


def test_errors_change_nothing_else() -> None:
    network = random_network(1, [30, 40, 40, 10], bias="negative")
    y0 = (np.random.default_rng(0).random((50, 30)) < 0.2).astype(np.uint8)
    plain, bounded = (oracle.infer(network, y0, errors=errors) for errors in (False, True))
    for name in ("activations", "categories", "active"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(bounded, name))
