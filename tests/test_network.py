"""SparseLayer and SparseNetwork: construction, validation, saving."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import sparse

from spdnn_jax import Clip, SparseLayer, SparseNetwork
from spdnn_jax.network import NetworkFile, save_layers
from tests.conftest import random_network


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10**6), inputs=st.integers(1, 20), outputs=st.integers(0, 20), kind=st.integers(0, 4))
def test_every_source_gives_the_same_layer(seed: int, inputs: int, outputs: int, kind: int) -> None:
    generator = np.random.default_rng(seed)
    dense = np.where(generator.random((inputs, outputs)) < 0.3, generator.normal(size=(inputs, outputs)), 0)
    dense = dense.astype(np.float32)
    sources = [
        lambda: SparseLayer.from_dense(dense, 0.5),
        lambda: SparseLayer.from_scipy(scipy.sparse.csr_array(dense), 0.5),
        lambda: SparseLayer.from_scipy(scipy.sparse.coo_matrix(dense), 0.5),
        lambda: SparseLayer.from_bcoo(sparse.BCOO.fromdense(jnp.asarray(dense)), 0.5),
        lambda: SparseLayer.from_bcoo(sparse.BCSR.fromdense(jnp.asarray(dense)), 0.5),
    ]
    layer = sources[kind]()
    assert layer.shape == (inputs, outputs)
    np.testing.assert_array_equal(layer.to_scipy().toarray(), dense)


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
        ({"indices": np.array([0.0, 2.0])}, "must be integers, got int64 and float64"),
        ({"values": np.array([1j, 2])}, "must be real numbers, got complex128"),
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
    with pytest.raises(ValueError, match="complex"):
        SparseLayer.from_dense(np.array([[1j]]))
    with pytest.raises(ValueError, match="negative neuron"):
        SparseLayer.from_bcoo(sparse.BCOO((jnp.ones(1), jnp.array([[0, -1]])), shape=(2, 2)))
    with pytest.raises(ValueError, match=r"must be a matrix \(inputs, outputs\), got shape \(3,\)"):
        SparseLayer.from_scipy(scipy.sparse.coo_array(np.ones(3)))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    path.write_bytes(b"not safetensors at all")
    with pytest.raises(ValueError, match="not a network file"):
        NetworkFile(path)
