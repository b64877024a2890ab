"""The CUDA kernels for weights in compressed rows, on the CPU (see emulate.py), under the address sanitizer."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp

from spdnn_jax import SparseLayer, build_plan, pack_bits
from tests.conftest import dense_reference, random_layer, random_network
from tests.emulator import emulate

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

SHAPES = [(1, 1, 1), (3, 45, 33), (5, 8, 2100), (37, 100, 64), (70, 9000, 20), (3, 30000, 9), (6, 60000, 5)]
"""Features, inputs, outputs: from 32 features of a block down to 1, and to inputs that no block can hold."""


SLICED = [(40, 100, 70), (33, 2500, 30), (70, 1300, 1100)]
"""One slice and three, one block of outputs and more; features that do not divide."""


@pytest.fixture(scope="module")
def emulator(session_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> emulate.RowsEmulator:
    program = emulate.build(session_folder / "emulator", main="rows_main.cc")
    return emulate.RowsEmulator(program, tmp_path_factory.mktemp("rows"))


def example(inputs: int, outputs: int) -> SparseLayer:
    generator = np.random.default_rng(inputs)
    return random_layer(generator, inputs, outputs, density=min(0.3, 200 / inputs))


def uneven(inputs: int, outputs: int) -> SparseLayer:
    """Rows of all lengths: some without edges, one with many, one with edges of the last inputs alone."""
    generator = np.random.default_rng(outputs)
    matrix = sp.random(inputs, outputs, 20 / inputs, rng=generator, dtype=np.float32).tolil()
    matrix[:, 3] = 0
    matrix[: inputs // 2, 7] = 1.5
    matrix[:, 11] = 0
    matrix[inputs - 2 :, 11] = 0.25
    return SparseLayer.from_scipy(matrix.tocsr(), bias=generator.normal(size=outputs))


def run_product(
    emulator: emulate.RowsEmulator, what: str, layer: SparseLayer, features: int, single: bool, masked: bool
) -> tuple[np.ndarray, np.ndarray]:
    """What a kernel gives, and what it should."""
    generator = np.random.default_rng(0)
    values = np.full(1, 0.5, np.float32) if single else np.asarray(layer.values)
    bias = np.full(1, 0.1, np.float32) if single else np.asarray(layer.bias)
    x = generator.normal(size=(features, layer.inputs)).astype(np.float32)
    kept_in, kept_out = (generator.random((features, width)) < 0.7 for width in (layer.inputs, layer.outputs))
    no_mask = np.zeros(0, np.uint32)
    out = emulator.run(
        what, [features, layer.inputs, layer.outputs, single, single],
        np.empty((features, layer.outputs), np.float32),
        **{"in": x}, indptr=np.asarray(layer.indptr, np.int32), indices=np.asarray(layer.indices),
        values=values, bias=bias, bounds=np.array([-1, 1.5], np.float32),
        in_mask=pack_bits(kept_in) if masked else no_mask, out_mask=pack_bits(kept_out) if masked else no_mask,
    )  # fmt: skip
    matrix = layer.to_scipy().astype(np.float64)
    matrix.data[:] = np.broadcast_to(values, matrix.data.shape)
    if not masked:
        np.testing.assert_array_equal(emulator.masks(features), pack_bits((out > -1) & (out < 1.5)))
    expected = np.clip((matrix.T @ (np.where(kept_in, x, 0) if masked else x).T).T + bias, -1, 1.5)
    return out, np.where(kept_out, expected, 0) if masked else expected


@pytest.mark.parametrize(("single", "masked"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", SHAPES)
def test_product(emulator: emulate.RowsEmulator, shape: tuple[int, int, int], single: bool, masked: bool) -> None:
    features, inputs, outputs = shape
    out, expected = run_product(emulator, "product", example(inputs, outputs), features, single, masked)
    np.testing.assert_allclose(out, expected, atol=1e-4)


@pytest.mark.parametrize(("single", "masked"), [(False, False), (True, True)])
@pytest.mark.parametrize("shape", SLICED)
def test_sliced_product(
    emulator: emulate.RowsEmulator, shape: tuple[int, int, int], single: bool, masked: bool
) -> None:
    features, inputs, outputs = shape
    out, expected = run_product(emulator, "sliced product", uneven(inputs, outputs), features, single, masked)
    np.testing.assert_allclose(out, expected, atol=1e-4)


def check_sampled(emulator: emulate.RowsEmulator, what: str, layer: SparseLayer, features: int) -> None:
    generator = np.random.default_rng(0)
    x, g = (generator.normal(size=(features, width)).astype(np.float32) for width in (layer.inputs, layer.outputs))
    sums = emulator.run(
        what, [features, layer.inputs, layer.outputs], np.empty(layer.edges, np.float32),
        **{"in": x}, gradient=g, indptr=np.asarray(layer.indptr, np.int32), indices=np.asarray(layer.indices),
    )  # fmt: skip
    rows = np.repeat(np.arange(layer.outputs), np.diff(layer.indptr))
    expected = np.einsum("be,be->e", x[:, layer.indices].astype(np.float64), g[:, rows].astype(np.float64))
    np.testing.assert_allclose(sums, expected, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_sampled_product(emulator: emulate.RowsEmulator, shape: tuple[int, int, int]) -> None:
    features, inputs, outputs = shape
    check_sampled(emulator, "sampled", example(inputs, outputs), features)


@pytest.mark.parametrize("shape", SLICED)
def test_sliced_sampled_product(emulator: emulate.RowsEmulator, shape: tuple[int, int, int]) -> None:
    features, inputs, outputs = shape
    check_sampled(emulator, "sliced sampled", uneven(inputs, outputs), features)


def test_sliced_rows_of_any_order(emulator: emulate.RowsEmulator) -> None:
    """A plan's rows name neurons by their slots, which do not ascend; indices that name nothing read zeros."""
    generator = np.random.default_rng(2)
    indices = generator.integers(-9, 1500, 3000).astype(np.int32)
    ends = np.sort(generator.integers(0, 3001, 71)).astype(np.int32)
    nothing = np.zeros(0, np.uint32)
    values = generator.normal(size=3000).astype(np.float32)
    x, g = (generator.normal(size=(33, width)).astype(np.float32) for width in (1300, 70))
    arrays = {"indptr": ends, "indices": indices, "values": values, "bias": np.zeros(1, np.float32), "in": x}
    arrays |= {"bounds": np.array([-99, 99], np.float32), "in_mask": nothing, "out_mask": nothing, "gradient": g}
    y = emulator.run("sliced product", [33, 1300, 70, False, True], np.empty((33, 70), np.float32), **arrays)
    named = (indices >= 0) & (indices < 1300)
    inputs = np.where(named, x[:, np.where(named, indices, 0)].astype(np.float64), 0)
    expected = [(inputs[:, a:b] * values[a:b]).sum(axis=1) for a, b in itertools.pairwise(ends)]
    np.testing.assert_allclose(y, np.transpose(expected), atol=1e-4)
    sums = emulator.run("sliced sampled", [33, 1300, 70], np.empty(3000, np.float32), **arrays)
    rows = np.repeat(np.arange(70), np.diff(ends))
    np.testing.assert_allclose(
        sums[ends[0] : ends[-1]], (inputs[:, ends[0] : ends[-1]] * g[:, rows]).sum(axis=0), atol=1e-4
    )


@pytest.mark.parametrize("seed", range(3))
def test_sliced_rows_past_the_checks(emulator: emulate.RowsEmulator, seed: int) -> None:
    """Rows that begin anywhere and overlap: nothing outside the buffers is read or written."""
    generator = np.random.default_rng(seed)
    arrays = {"indptr": generator.integers(-50, 3500, 71).astype(np.int32), "values": np.ones(3000, np.float32)}
    arrays |= {"indices": generator.integers(-9, 1500, 3000).astype(np.int32), "bias": np.zeros(1, np.float32)}
    arrays |= {"bounds": np.array([-9, 9], np.float32), "in": np.ones((33, 1300), np.float32)}
    arrays |= {name: np.zeros(0, np.uint32) for name in ("in_mask", "out_mask")}
    y = emulator.run("sliced product", [33, 1300, 70, False, True], np.empty((33, 70), np.float32), **arrays)
    assert not np.isnan(y).any()
    arrays["gradient"] = np.ones((33, 70), np.float32)
    emulator.run("sliced sampled", [33, 1300, 70], np.empty(3000, np.float32), **arrays)


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
