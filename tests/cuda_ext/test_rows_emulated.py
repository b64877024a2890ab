"""The CUDA kernels for weights in compressed rows, on the CPU (see emulate.py), under the address sanitizer."""

from pathlib import Path

import numpy as np
import pytest

from spdnn_jax import SparseLayer, build_plan
from tests.conftest import dense_reference, random_layer, random_network
from tests.emulator import emulate

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

SHAPES = [(1, 1, 1), (3, 45, 33), (5, 8, 2100), (37, 100, 64), (70, 9000, 20), (3, 30000, 9), (6, 60000, 5)]
"""Features, inputs, outputs: from 32 features of a block down to 1, and to inputs that no block can hold."""


@pytest.fixture(scope="module")
def emulator(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> emulate.RowsEmulator:
    program = emulate.build(session_folder / "emulator", main="rows_main.cc")
    return emulate.RowsEmulator(program, tmp_path_factory.mktemp("rows"))


def example(inputs: int, outputs: int) -> SparseLayer:
    generator = np.random.default_rng(inputs)
    return random_layer(generator, inputs, outputs, density=min(0.3, 200 / inputs))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(emulator: emulate.RowsEmulator, shape: tuple[int, int, int], single: bool) -> None:
    features, inputs, outputs = shape
    layer = example(inputs, outputs)
    values = np.full(1, 0.5, np.float32) if single else np.asarray(layer.values)
    bias = np.full(1, 0.1, np.float32) if single else np.asarray(layer.bias)
    x = np.random.default_rng(0).normal(size=(features, inputs)).astype(np.float32)
    out = emulator.run(
        "product", [features, inputs, outputs, single, single], np.empty((features, outputs), np.float32),
        **{"in": x}, indptr=np.asarray(layer.indptr, np.int32), indices=np.asarray(layer.indices),
        values=values, bias=bias,
        bounds=np.array([-1, 1.5], np.float32),
    )  # fmt: skip
    matrix = layer.to_scipy().astype(np.float64)
    matrix.data[:] = np.broadcast_to(values, matrix.data.shape)
    np.testing.assert_allclose(out, np.clip((matrix.T @ x.T.astype(np.float64)).T + bias, -1, 1.5), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_product(emulator: emulate.RowsEmulator, shape: tuple[int, int, int]) -> None:
    features, inputs, outputs = shape
    layer = example(inputs, outputs)
    generator = np.random.default_rng(0)
    x, g = (generator.normal(size=(features, width)).astype(np.float32) for width in (inputs, outputs))
    sums = emulator.run(
        "sampled", [features, inputs, outputs], np.empty(layer.edges, np.float32),
        **{"in": x}, gradient=g, indptr=np.asarray(layer.indptr, np.int32), indices=np.asarray(layer.indices),
    )  # fmt: skip
    rows = np.repeat(np.arange(outputs), np.diff(layer.indptr))
    expected = np.einsum("be,be->e", x[:, layer.indices].astype(np.float64), g[:, rows].astype(np.float64))
    np.testing.assert_allclose(sums, expected, atol=1e-4)


@pytest.mark.parametrize("compress", ["none", "full"])
def test_chain_and_its_derivative(emulator: emulate.RowsEmulator, compress: str) -> None:
    """The derivative against the dense one, given the masks; its transpose by the inner product of both."""
    network = random_network(3, [45, 70, 33, 20], 1.0, density=0.2, grouped=3)
    rows = build_plan(network, compress=compress, derivatives=True).rows  # pyright: ignore[reportArgumentType]
    assert rows is not None
    arrays = {"records": rows.table.records, "words": np.asarray(rows.words)}
    generator = np.random.default_rng(1)
    y0, direction = (generator.random((9, 45), np.float32) for _ in range(2))
    y = emulator.run("chain", [9], np.empty((9, 20), np.float32), **{"in": y0}, **arrays)
    np.testing.assert_allclose(y, dense_reference(network, y0), atol=1e-5)
    masks = emulator.masks(9)
    step = 1e-4
    forward = emulator.run("derivative", [9], np.empty((9, 20), np.float32), **{"in": direction}, masks=masks, **arrays)
    moved = dense_reference(network, y0 + step * direction.astype(np.float64))
    difference = (moved - dense_reference(network, y0.astype(np.float64))) / step
    near = np.isclose(forward, difference, atol=1e-3)
    assert near.mean() > 0.95, "but where a bound was crossed"
    cotangent = generator.random((9, 20), np.float32)
    back = emulator.run("transposed", [9], np.empty((9, 45), np.float32), **{"in": cotangent}, masks=masks, **arrays)
    np.testing.assert_allclose((back * direction).sum(axis=1), (forward * cotangent).sum(axis=1), rtol=1e-4)
