"""Patterns of real networks: that they are what they say, and that `infer` runs them as the oracle does."""

import numpy as np
import pytest

from benchmarks.patterns import PATTERNS, banded, blocks, convolution, magnitude_pruned
from spdnn_jax import Clip, SparseNetwork, build_plan, categories, infer, layer
from spdnn_jax.graph_challenge import oracle


@pytest.mark.parametrize("kernel", ["auto", "staged", "grouped"])
@pytest.mark.parametrize("name", PATTERNS)
def test_infer_equals_the_oracle(name: str, kernel: str, on_cpu: None) -> None:
    generator = np.random.default_rng(0)
    network = SparseNetwork(tuple(PATTERNS[name](generator, 196) for _ in range(3)), Clip.relu(32))
    plan = build_plan(network, kernel=kernel)  # pyright: ignore[reportArgumentType]
    for features in (1, 5, 70):
        y0 = generator.random((features, network.inputs)) < 0.3
        expected = oracle.infer(network, y0)
        np.testing.assert_allclose(infer(plan, y0), expected.activations, rtol=1e-4, atol=1e-4)
        np.testing.assert_array_equal(categories(plan, y0), expected.activations.any(axis=1))


@pytest.mark.parametrize("pruned", [0.7, 0.9, 0.98])
def test_pruned_layers_are_uneven_both_ways(pruned: float) -> None:
    """Of a uniformly random layer of this size the fullest row has 1.4 times the average at most."""
    kept = magnitude_pruned(np.random.default_rng(0), 600, 800, pruned).to_scipy().toarray() != 0
    assert kept.mean() == pytest.approx(1 - pruned, abs=1e-3)
    for axis in (0, 1):
        sums = kept.sum(axis=axis)
        assert sums.max() > 1.8 * sums.mean()
        assert np.quantile(sums, 0.05) < 0.6 * sums.mean()


def test_a_convolution_is_one(on_cpu: None) -> None:
    """Beside SciPy's, of two channels, at the borders, too."""
    from scipy.signal import correlate  # takes a second, and every process that runs tests imports this file

    part = convolution(np.random.default_rng(0), 5, 7, 2, 3)
    impulses = np.eye(part.inputs, dtype=np.float32).reshape(-1, 5, 7, 2)
    response = np.asarray(layer(part, impulses.reshape(part.inputs, -1), activation=Clip.identity()))
    response = response.reshape(-1, 5, 7, 3) - np.float32(-0.1)
    weights = response[(2 * 7 + 3) * 2 + np.arange(2), 1:4, 2:5][:, ::-1, ::-1]  # [channel, dy, dx, kernel]
    y0 = np.random.default_rng(1).normal(size=(5, 7, 2)).astype(np.float32)
    found = np.asarray(layer(part, y0.reshape(1, -1), activation=Clip.identity())).reshape(5, 7, 3) + 0.1
    for kernel in range(3):
        expected = sum(correlate(y0[..., c], weights[c, ..., kernel], mode="same") for c in range(2))
        np.testing.assert_allclose(found[..., kernel], expected, rtol=1e-4, atol=1e-4)


def test_bands_and_blocks_lie_where_they_should() -> None:
    generator = np.random.default_rng(0)
    inputs, outputs = banded(generator, 100, 50, 9).to_scipy().tocoo().coords
    assert np.abs(inputs - 2 * outputs).max() == 4
    pattern = blocks(generator, 96, 64, 0.3).to_scipy().toarray() != 0
    by_block = pattern.reshape(6, 16, 4, 16).sum(axis=(1, 3))
    assert set(np.unique(by_block)) == {0, 256}
