"""The float64 oracle, against dense matrices."""

import numpy as np
import pytest

from spdnn_jax import Clip, SparseLayer, SparseNetwork
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
