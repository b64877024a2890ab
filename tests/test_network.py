"""SparseLayer and SparseNetwork: construction, validation, saving."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan
from spdnn_jax._tensors import TensorWriter, digest
from spdnn_jax.network import NetworkFile, save_layers
from tests.conftest import FUZZ, random_network


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), inputs=st.integers(1, 20), outputs=st.integers(0, 20), kind=st.integers(0, 4))
def test_every_source_gives_the_same_layer(seed: int, inputs: int, outputs: int, kind: int) -> None:
    generator = np.random.default_rng(seed)
    dense = np.where(generator.random((inputs, outputs)) < 0.3, generator.normal(size=(inputs, outputs)), 0)
    dense = dense.astype(np.float32)
    matrix = scipy.sparse.csr_array(dense)  # JAX would compile `fromdense` for each shape
    sources = [
        lambda: SparseLayer.from_dense(dense, 0.5),
        lambda: SparseLayer.from_scipy(matrix, 0.5),
        lambda: SparseLayer.from_scipy(scipy.sparse.coo_matrix(dense), 0.5),
        lambda: SparseLayer.from_bcoo(sparse.BCOO.from_scipy_sparse(matrix), 0.5),
        lambda: SparseLayer.from_bcoo(sparse.BCSR.from_scipy_sparse(matrix), 0.5),
    ]
    layer = sources[kind]()
    assert layer.shape == (inputs, outputs)
    np.testing.assert_array_equal(layer.to_scipy().toarray(), dense)


def test_a_layer_of_any_size_compiles_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """JAX would compile a program for each size, which takes longer than all else."""
    with jax.log_compiles():
        SparseLayer.from_scipy(scipy.sparse.eye_array(173).tocsc(), np.zeros(173)).with_transposed()
    assert not caplog.messages


def test_a_layer_is_its_own() -> None:
    """A change of the caller's arrays is none of it: JAX shares memory that begins where a cache line does."""
    buffer = np.zeros(1000 + 16, np.float32)
    start = -buffer.ctypes.data % 64 // 4
    weights = buffer[start : start + 1000]
    weights[:] = 1
    matrix = scipy.sparse.csc_array((weights, np.arange(1000), np.arange(1001)), shape=(1000, 1000))
    assert np.shares_memory(matrix.data, weights)
    layer = SparseLayer.from_scipy(matrix)
    matrix.data[:] = 2
    np.testing.assert_array_equal(layer.values, 1)


def test_padding_of_bcoo_is_no_edge() -> None:
    """A BCOO with nse beyond its entries pads with indices out of bounds."""
    dense = np.eye(3, dtype=np.float32)
    layer = SparseLayer.from_bcoo(sparse.BCOO.fromdense(jnp.asarray(dense), nse=7))
    assert layer.edges == 3


def test_duplicates_are_summed_or_refused() -> None:
    matrix = scipy.sparse.coo_array(([1.0, 2.0, 4.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    np.testing.assert_array_equal(SparseLayer.from_scipy(matrix).to_scipy().toarray(), [[0, 3], [4, 0]])
    with pytest.raises(ValueError, match="from input 0 to output 1 is stored twice"):
        SparseLayer.from_scipy(matrix, duplicates="refuse")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.array([0, 5], np.int32)}, "names input 5, but there are 3"),
        ({"indices": np.array([-1, 0], np.int32)}, "names input -1"),
        ({"values": np.array([1.0, np.nan], np.float32)}, "weight 1 is nan"),
        ({"values": np.array([1.0, np.inf], np.float32)}, "weight 1 is inf"),
        ({"bias": np.float32(np.nan)}, "bias 0 is nan"),
        ({"bias": np.zeros(5, np.float32)}, r"bias must have shape \(\) or \(1,\)"),
        ({"values": np.zeros(3, np.float32)}, "values must have shape"),
        ({"indptr": np.array([0, 3])}, "indptr must rise"),
        ({"indices": np.array([2, 1], np.int32)}, "output 0 are not ascending"),
        ({"indices": np.array([0.0, 2.0])}, "indices must be integers, got float64"),
        ({"values": np.array([1j, 2])}, "values must be real numbers, got complex128"),
        ({"indices": np.array([1, 1], np.int32)}, "output 0 are not ascending and distinct"),
    ],
)
def test_malformed_layers_are_named(change: dict[str, Any], message: str) -> None:
    arrays: dict[str, Any] = {
        "indptr": np.array([0, 2]),
        "indices": np.array([0, 2], np.int32),
        "values": np.array([1.0, 2.0], np.float32),
        "bias": np.float32(0),
    }
    SparseLayer(**arrays, inputs=3).validate()
    network = SparseNetwork((SparseLayer(**(arrays | change), inputs=3),))
    with pytest.raises(ValueError, match="layer 1: .*" + message):
        network.validate()


def test_layers_must_chain() -> None:
    wide, narrow = SparseLayer.from_dense(np.ones((3, 4))), SparseLayer.from_dense(np.ones((3, 2)))
    with pytest.raises(ValueError, match="layer 2 has 3 inputs, but layer 1 has 4 outputs"):
        SparseNetwork((wide, narrow))


def test_a_network_is_a_pytree() -> None:
    network = random_network(0, [5, 4, 3], cap=None)
    leaves, structure = jax.tree.flatten(network)
    assert len(leaves) == 8
    again = jax.tree.unflatten(structure, leaves)
    assert again.activation == (Clip.relu(), Clip.relu())
    assert again.layers[1].inputs == 4


@pytest.mark.parametrize("activation", [Clip.relu(), Clip.relu(0.1), (Clip(-1, 1), Clip.identity())])
def test_save_and_load(tmp_path: Path, activation: Clip | tuple[Clip, ...]) -> None:
    network = random_network(1, [70000, 6, 3], activation=activation, density=0.001)
    path = tmp_path / "network.safetensors"
    network.save(path)
    again = SparseNetwork.load(path)
    assert again.activation == network.activation
    for before, after in zip(network.layers, again.layers, strict=True):
        assert after.inputs == before.inputs
        for name in ("indptr", "indices", "values", "bias"):
            np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert [file.name for file in tmp_path.iterdir()] == ["network.safetensors"]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    def breaks() -> object:
        yield SparseLayer.from_dense(np.ones((2, 2)))
        raise ValueError("the second layer cannot be read")

    with pytest.raises(ValueError, match="second layer"):
        save_layers(tmp_path / "network.safetensors", breaks(), 2, Clip.relu())  # pyright: ignore[reportArgumentType]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("announced", [1, 3])
def test_the_number_of_layers_is_checked(tmp_path: Path, announced: int) -> None:
    """A reader that stops early would leave a shorter network that loads without complaint."""
    with pytest.raises(ValueError, match=f"2 layers came where {announced} were announced"):
        save_layers(tmp_path / "network.safetensors", random_network(0, [3, 4, 5]).layers, announced, Clip.relu())
    assert not list(tmp_path.iterdir())


def test_saving_checks_that_layers_chain(tmp_path: Path) -> None:
    layers = [SparseLayer.from_dense(np.ones((3, 4))), SparseLayer.from_dense(np.ones((3, 2)))]
    with pytest.raises(ValueError, match="layer 2 has 3 inputs, but layer 1 has 4 outputs"):
        save_layers(tmp_path / "network.safetensors", layers, 2, Clip.relu())


def test_wrong_indices_are_not_wrapped_into_range(tmp_path: Path) -> None:
    """Stored in 16 bits, input 65541 would become input 5."""
    layer = SparseLayer(np.array([0, 1]), np.array([65541]), np.array([1.0]), np.array(0.0), 10)
    with pytest.raises(ValueError, match="layer 1: an edge names input 65541"):
        save_layers(tmp_path / "network.safetensors", [layer], 1, Clip.relu())


def test_other_dtypes_are_stored_as_the_layer_documents(tmp_path: Path) -> None:
    layer = SparseLayer(np.array([0, 1], np.int32), np.array([2]), np.array([0.5]), np.asarray(0.25), 3)
    save_layers(tmp_path / "network.safetensors", [layer], 1, Clip.relu())
    (again,) = NetworkFile(tmp_path / "network.safetensors")
    assert (again.indptr.dtype, again.indices.dtype) == (np.int64, np.int32)
    assert (again.values.dtype, again.bias.dtype) == (np.float32, np.float32)
    assert (again.indices[0], again.values[0], again.bias) == (2, 0.5, 0.25)


def test_matrices_that_are_none_are_named() -> None:
    with pytest.raises(ValueError, match="real numbers, got complex"):
        SparseLayer.from_dense(np.array([[1j]]))
    with pytest.raises(ValueError, match="negative neuron"):
        SparseLayer.from_bcoo(sparse.BCOO((jnp.ones(1), jnp.array([[0, -1]])), shape=(2, 2)))
    with pytest.raises(ValueError, match=r"must be a matrix \(inputs, outputs\), got shape \(3,\)"):
        SparseLayer.from_scipy(scipy.sparse.coo_array(np.ones(3)))


@pytest.mark.parametrize("indptr", [[0, 1 << 40, 0], [0, (1 << 63) - 1, -2, 0]])
def test_pointers_of_scipy_that_lie_are_refused(indptr: list[int]) -> None:
    """SciPy itself takes them where there are no entries, and its conversions then write anywhere."""
    matrix = scipy.sparse.csr_array((len(indptr) - 1, 3))
    matrix.indptr = np.asarray(indptr, np.int64)
    with pytest.raises(ValueError, match=r"[iI]ndex"):
        SparseLayer.from_scipy(matrix)


def test_numbers_of_numpy_are_numbers(tmp_path: Path) -> None:
    """They are no JSON: the file would fail after all layers were written."""
    layer = SparseLayer(np.array([0, 1]), np.array([2]), np.array([0.5]), np.asarray(0.25), np.int64(3))  # pyright: ignore[reportArgumentType]
    network = SparseNetwork((layer,), Clip(np.float32(0), np.float64(4)))  # pyright: ignore[reportArgumentType]
    network.save(tmp_path / "network")
    again = SparseNetwork.load(tmp_path / "network")
    assert (again.layers[0].shape, again.activation) == ((3, 1), (Clip(0, 4),))
    with pytest.raises(ValueError, match=r"layer 1: inputs must be a whole number, got 3\.5"):
        SparseNetwork((SparseLayer(layer.indptr, layer.indices, layer.values, layer.bias, 3.5),)).save(  # pyright: ignore[reportArgumentType]
            tmp_path / "network"
        )


def test_weights_that_overflow_are_refused(tmp_path: Path) -> None:
    """Stored as float32 they would be infinite."""
    layer = SparseLayer(np.array([0, 1]), np.array([2]), np.array([1e300]), np.asarray(0.25), 3)
    with pytest.raises(ValueError, match=r"layer 1: values: number 0 is 1e\+300, out of the range of float32"):
        save_layers(tmp_path / "network", [layer], 1, Clip.relu())


def test_a_file_of_the_user_s_own_is_not_touched(tmp_path: Path) -> None:
    """Once the unfinished file was named network.part."""
    (tmp_path / "network.part").write_text("mine")
    random_network(0, [3, 4]).save(tmp_path / "network")
    assert (tmp_path / "network.part").read_text() == "mine"


@pytest.mark.parametrize("read", [SparseNetwork.load, NetworkFile])
def test_paths_that_are_no_network_are_named(tmp_path: Path, read: Callable[[Path], object]) -> None:
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent"):
        read(tmp_path / "absent")
    path = tmp_path / "network"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match=f"^{path}: not a network file .*: write it again with spdnn convert"):
        read(path)
    build_plan(random_network(0, [3, 4])).save(path)
    with pytest.raises(ValueError, match="not a network file of this version"):
        read(path)


def test_no_flipped_bit_of_a_file_changes_a_network(tmp_path: Path) -> None:
    """Bytes of a small network's file with one bit flipped: refused, or the network as it was, bound for bound."""
    path = tmp_path / "network"
    network = random_network(5, [6, 9, 5], activation=(Clip.relu(3), Clip(-1, 1)))
    network.save(path)
    whole = path.read_bytes()
    expected = jax.tree.leaves(network)
    header = 8 + int.from_bytes(whole[:8], "little")
    positions = [*range(len(whole[:header].rstrip())), *range(header, len(whole))][:: 1 if FUZZ else 8]
    generator = np.random.default_rng(0)
    refused = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << generator.integers(8)
        path.write_bytes(damaged)
        try:
            again = SparseNetwork.load(path)
        except ValueError as error:
            assert str(path) in str(error)
            refused += 1
            continue
        assert again.activation == network.activation
        for before, after in zip(expected, jax.tree.leaves(again), strict=True):
            np.testing.assert_array_equal(after, before)
    assert refused > 0.9 * len(positions)


@pytest.mark.parametrize("missing", ["2.indptr", "1.indices", "1.values", "2.bias", "digests"])
@pytest.mark.parametrize("instead", [None, np.zeros((2, 2), np.float32), np.zeros(0, np.uint8)])
def test_missing_and_mistyped_tensors_are_named(tmp_path: Path, missing: str, instead: np.ndarray | None) -> None:
    path = tmp_path / "network"
    random_network(5, [6, 9, 5]).save(path)
    with safetensors.safe_open(path, "numpy") as file:
        metadata = file.metadata()
    tensors = safetensors.numpy.load_file(path)
    del tensors[missing]
    if instead is not None:
        tensors[missing] = instead
    safetensors.numpy.save_file(tensors, path, metadata)
    with pytest.raises(ValueError, match=f"^{path}: {missing} .*write it again"):
        SparseNetwork.load(path)


@pytest.mark.parametrize("name", ["inputs", "activation"])
@pytest.mark.parametrize(
    "instead",
    [None, "null", "[6, null]", "[[0, 1], [0, 1], [0, 1]]", "[6.5, 9]", '"6"', "[" * 4000, "[[1, 0], [0, 1]]"],
)
def test_metadata_that_lies_is_named(tmp_path: Path, name: str, instead: str | None) -> None:
    """With a checksum that is right: what somebody made, not what broke."""
    arrays = [np.zeros(10, np.int64), np.zeros(0, np.uint16), np.zeros(0, np.float32), np.float32(0)]
    path = tmp_path / "network"
    metadata: dict[str, Any] = {"inputs": "[6, 9]", "activation": "[[0, 1], [0, 1]]"} | {name: instead}
    with path.open("wb") as file:
        writer = TensorWriter(file, "spdnn_jax network 2", 8)
        for number in (1, 2):
            for field, array in zip(("indptr", "indices", "values", "bias"), arrays, strict=True):
                writer.add(f"{number}.{field}", np.asarray(array))
        writer.finish({key: text for key, text in metadata.items() if text is not None}, [digest(*arrays)] * 2)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=f"^{path}: .*write it again"):
        SparseNetwork.load(path)
