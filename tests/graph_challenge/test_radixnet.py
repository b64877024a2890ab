"""The generator of challenge-like networks."""

from pathlib import Path

import numpy as np
import pytest

from spdnn_jax.graph_challenge import official_files, radixnet


def test_layers_have_the_challenge_shape() -> None:
    for layer in radixnet.layers(256, 12, seed=3):
        layer.validate()
        assert layer.shape == (256, 256)
        assert (np.diff(layer.indptr) == 32).all()
        assert (np.bincount(layer.indices) == 32).all()
        assert layer.values == 1 / 16


def test_seed_decides_from_the_second_group_on() -> None:
    one, same, other = (list(radixnet.layers(64, 4, seed)) for seed in (1, 1, 2))
    for layer in range(4):
        np.testing.assert_array_equal(one[layer].indices, same[layer].indices)
        assert np.array_equal(one[layer].indices, other[layer].indices) == (layer < 2)


def test_first_layers_equal_the_official_ones(shared_data: Path) -> None:
    """The generator would still make valid networks if it had the butterfly wrong."""
    official = official_files.layers(shared_data / "graph-challenge", 1024, 6)
    for ours, theirs in zip(radixnet.layers(1024, 6), official, strict=True):
        np.testing.assert_array_equal(ours.indices, theirs.indices)
        np.testing.assert_array_equal(ours.indptr, theirs.indptr)
        assert ours.values == theirs.values
        assert ours.bias == theirs.bias


@pytest.mark.parametrize("neurons", [0, 16, 100, 1000, 48])
def test_other_widths_are_refused(neurons: int) -> None:
    with pytest.raises(ValueError, match=r"16 \* 2\^k"):
        radixnet.layers(neurons, 1)


@pytest.mark.parametrize(("neurons", "bias"), [(1024, -0.3), (4096, -0.35), (16384, -0.4), (65536, -0.45), (64, -0.3)])
def test_bias(neurons: int, bias: float) -> None:
    assert radixnet.bias(neurons) == bias
