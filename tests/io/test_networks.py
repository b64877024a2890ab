"""`read_network`: every form reads back what was written, and a file that is not what it claims says so in one line."""

import gzip
import io
import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse as sp

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, infer
from spdnn_jax.io import read_network
from tests.conftest import random_network

RELU = Clip.relu()
WIDTHS = [7, 5, 6, 3]


@pytest.fixture
def network() -> SparseNetwork:
    return random_network(0, WIDTHS, activation=[RELU, Clip(-1, 1), Clip.identity()])


def assert_equal(found: SparseNetwork, expected: SparseNetwork) -> None:
    assert [layer.shape for layer in found.layers] == [layer.shape for layer in expected.layers]
    for one, other in zip(found.layers, expected.layers, strict=True):
        for field in ("indptr", "indices", "values"):
            np.testing.assert_array_equal(getattr(one, field), getattr(other, field))
        np.testing.assert_array_equal(np.broadcast_to(one.bias, one.outputs), np.broadcast_to(other.bias, one.outputs))
    y0 = np.random.default_rng(1).normal(size=(9, expected.inputs)).astype(np.float32)
    np.testing.assert_array_equal(infer(build_plan(found), y0), infer(build_plan(expected), y0))


def biases(network: SparseNetwork) -> list[np.ndarray]:
    return [np.asarray(layer.bias) for layer in network.layers]


def edges(layer: SparseLayer, base: int) -> bytes:
    matrix = layer.to_scipy().tocoo()
    lines = zip(matrix.row + base, matrix.col + base, matrix.data, strict=True)
    return "".join(f"{i}\t{j}\t{w!r}\n" for i, j, w in ((i, j, float(w)) for i, j, w in lines)).encode()


def saved(write: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments, **options)
    return buffer.getvalue()


WRITERS: dict[str, Callable[[SparseLayer], bytes]] = {
    "npz": lambda layer: saved(sp.save_npz, layer.to_scipy()),
    "mtx": lambda layer: saved(scipy.io.mmwrite, layer.to_scipy()),
    "tsv": lambda layer: edges(layer, 1),
}


@pytest.mark.parametrize("suffix", ["", ".{form}", ".{form}.gz"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", WRITERS)
def test_one_file_a_layer(tmp_path: Path, network: SparseNetwork, form: str, packed: bool, suffix: str) -> None:
    """What a file is, its name or its first bytes say; whether it is gzipped, its first bytes alone."""
    paths = []
    for number, layer in enumerate(network.layers):
        path = tmp_path / f"layer{number}{suffix.format(form=form)}"
        content = WRITERS[form](layer)
        path.write_bytes(gzip.compress(content) if packed else content)
        paths.append(path)
    assert_equal(read_network(paths, biases=biases(network), activation=network.activation), network)


@pytest.mark.parametrize("form", ["npz", "mtx", "tsv"])
def test_matrices_that_stand_as_outputs_and_inputs(tmp_path: Path, form: str) -> None:
    network = random_network(2, [4, 6], bias="scalar", activation=RELU)
    matrix = network.layers[0].to_scipy().T
    path = tmp_path / f"layer.{form}"
    transposed = SparseLayer.from_scipy(matrix)
    path.write_bytes(WRITERS[form](transposed))
    found = read_network(path, transpose=True, biases=np.float32(0.1), activation=RELU, inputs=4, outputs=6)
    assert_equal(found, network)


def test_a_folder_stands_for_its_files_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    network = random_network(3, [6] * 12, activation=Clip.identity(), density=0.5)
    weights, values = tmp_path / "weights", tmp_path / "biases"
    weights.mkdir()
    values.mkdir()
    for number, layer in enumerate(network.layers):
        (weights / f"l{number}-sparse.tsv").write_bytes(edges(layer, 0))
        np.savetxt(values / f"b{number}.txt", layer.bias)
    (weights / ".hidden").write_text("not a layer")
    found = read_network(weights, biases=values, index_base=0, activation=Clip.identity())
    assert_equal(found, network)


def test_biases_beside_the_layers(tmp_path: Path, network: SparseNetwork) -> None:
    """As numbers, vectors, or files of any kind; a number for all layers."""
    paths = []
    for number, layer in enumerate(network.layers):
        paths.append(tmp_path / f"layer{number}.npz")
        sp.save_npz(paths[-1], layer.to_scipy())
    np.save(tmp_path / "bias.npy", network.layers[1].bias)
    mixed = [np.asarray(network.layers[0].bias), tmp_path / "bias.npy", 0.25]
    found = read_network(paths, biases=mixed, activation=RELU)
    np.testing.assert_array_equal(found.layers[0].bias, network.layers[0].bias)
    np.testing.assert_array_equal(found.layers[1].bias, network.layers[1].bias)
    assert float(found.layers[2].bias) == 0.25
    assert [float(layer.bias) for layer in read_network(paths, biases=-0.5, activation=RELU).layers] == [-0.5] * 3
    assert [float(layer.bias) for layer in read_network(paths, activation=RELU).layers] == [0] * 3
    with pytest.raises(ValueError, match="2 biases do not go with 3 layers"):
        read_network(paths, biases=[0, 1], activation=RELU)


def test_dense_layers_as_lists_of_weights(tmp_path: Path) -> None:
    """All weights row by row, one a line; the number of outputs comes from the biases."""
    weights = np.arange(1, 13, dtype=np.float32).reshape(4, 3)
    np.savetxt(tmp_path / "dense.tsv", weights.reshape(-1))
    np.savetxt(tmp_path / "transposed.tsv", weights.T.reshape(-1))
    network = SparseNetwork([SparseLayer.from_dense(weights, np.arange(3))], RELU)
    path = tmp_path / "dense.tsv"
    assert_equal(read_network(path, biases=[np.arange(3)], activation=RELU), network)
    assert_equal(
        read_network(tmp_path / "transposed.tsv", biases=[np.arange(3)], transpose=True, activation=RELU), network
    )
    with pytest.raises(ValueError, match=r"dense\.tsv: 12 weights without indices .* pass biases="):
        read_network(path, activation=RELU)
    with pytest.raises(ValueError, match="there are 5 outputs"):
        read_network(path, biases=[np.zeros(5)], activation=RELU)


def test_sizes_that_no_file_says(tmp_path: Path) -> None:
    """An edge file names no sizes: what is given counts, then neighbours and biases, then the largest edge."""
    (tmp_path / "l1.tsv").write_text("1\t1\t1\n2\t2\t1\n")
    (tmp_path / "l2.tsv").write_text("1\t1\t1\n4\t2\t1\n")
    found = read_network(tmp_path, activation=RELU)
    assert [layer.shape for layer in found.layers] == [(2, 4), (4, 2)]
    found = read_network(tmp_path, activation=RELU, inputs=9, biases=[np.zeros(6), np.zeros(3)])
    assert [layer.shape for layer in found.layers] == [(9, 6), (6, 3)]
    found = read_network(tmp_path, activation=RELU, outputs=8)
    assert found.outputs == 8
    with pytest.raises(ValueError, match=r"l1\.tsv: an edge names input 1, but there are 1"):
        read_network(tmp_path, activation=RELU, inputs=1)
    with pytest.raises(ValueError, match=r"l2\.tsv: an edge names input 3, but there are 3"):
        read_network(tmp_path, activation=RELU, biases=[np.zeros(3), 0])


def test_a_size_that_files_contradict(tmp_path: Path) -> None:
    sp.save_npz(tmp_path / "m.npz", sp.eye_array(3, format="csr"))
    with pytest.raises(ValueError, match=r"m\.npz: the network has 3 inputs, 4 were asked for"):
        read_network(tmp_path / "m.npz", activation=RELU, inputs=4)


# --- state dicts ------------------------------------------------------------------------------------------------------


def state_dict(network: SparseNetwork, form: str, names: list[str]) -> dict[str, np.ndarray]:
    """The network as PyTorch holds it: (outputs, inputs)."""
    tensors: dict[str, np.ndarray] = {}
    for name, layer in zip(names, network.layers, strict=True):
        matrix = sp.csr_array(layer.to_scipy().T)
        weight = f"{name}.weight"
        if form == "dense":
            tensors[weight] = matrix.toarray()
        elif form == "masked":
            tensors[f"{weight}_mask"] = (matrix.toarray() != 0).astype(np.float32)
            tensors[f"{weight}_orig"] = np.where(matrix.toarray() == 0, 7, matrix.toarray()).astype(np.float32)
        else:
            tensors[f"{weight}.crow_indices"] = matrix.indptr.astype(np.int64)
            tensors[f"{weight}.col_indices"] = matrix.indices.astype(np.int64)
            tensors[f"{weight}.values"] = matrix.data
            if form == "csr with shape":
                tensors[f"{weight}.shape"] = np.asarray(matrix.shape)
        tensors[f"{name}.bias"] = np.asarray(layer.bias)
    return tensors


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["dense", "masked", "csr", "csr with shape"])
def test_state_dicts(tmp_path: Path, network: SparseNetwork, form: str, packed: bool) -> None:
    path = tmp_path / "model.safetensors"
    content = safetensors.numpy.save(state_dict(network, form, ["0", "2", "10"]))  # the order is not the alphabet's
    path.write_bytes(gzip.compress(content) if packed else content)
    assert_equal(read_network(path, activation=network.activation, inputs=7), network)


def test_names_in_order(tmp_path: Path, network: SparseNetwork) -> None:
    """Names that say no order are given in order; what is not named is not read."""
    tensors = state_dict(network, "dense", ["input", "hidden", "exit"]) | {"norm.running_mean": np.zeros(5)}
    path = tmp_path / "model"  # told by its first bytes
    path.write_bytes(safetensors.numpy.save(tensors))
    names = ["input.weight", "hid*.weight", "exit.weight"]
    assert_equal(read_network(path, names=names, activation=network.activation), network)
    with pytest.raises(ValueError, match=r"no weight or bias of a sparse layer, norm\.running_mean"):
        read_network(path, activation=network.activation)
    with pytest.raises(ValueError, match=r"no tensor is called output\.weight: .* of exit\.bias, exit\.weight"):
        read_network(path, names=["output.weight"], activation=RELU)
    with pytest.raises(ValueError, match="layer 2 has 6 inputs, but layer 1 has 5 outputs"):
        read_network(path, names=["input.weight", "exit.weight", "hidden.weight"], activation=RELU)
    chosen = read_network(path, names="hidden.*weight", activation=RELU)
    assert [layer.shape for layer in chosen.layers] == [(5, 6)]


def test_a_state_dict_in_parts(tmp_path: Path, network: SparseNetwork) -> None:
    tensors = state_dict(network, "csr", ["0", "1", "2"])
    names = sorted(tensors)
    for number in range(2):
        part = {name: tensors[name] for name in names[number::2]}
        (tmp_path / f"model-{number + 1}-of-2.safetensors").write_bytes(safetensors.numpy.save(part))
    assert_equal(read_network(tmp_path, activation=network.activation, inputs=7), network)
    (tmp_path / "again.safetensors").write_bytes(safetensors.numpy.save({names[0]: tensors[names[0]]}))
    with pytest.raises(ValueError, match="stands in another of the files, too"):
        read_network(tmp_path, activation=network.activation)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", "int8"])
def test_tensors_of_other_dtypes(tmp_path: Path, dtype: str) -> None:
    dense = np.array([[1, 0, -2], [0, 0.5 if dtype != "int8" else 3, 0]])
    tensors = {"fc.weight": np.asarray(jnp.asarray(dense, jnp.float32)).astype(jnp.dtype(dtype))}
    path = tmp_path / "model.safetensors"
    for form in ("dense", "csr"):
        if form == "csr":
            weights = tensors.pop("fc.weight")
            tensors |= {
                "fc.weight.crow_indices": np.array([0, 2, 3]),
                "fc.weight.col_indices": np.array([0, 2, 1]),
                "fc.weight.values": weights[weights != 0],
            }
        path.write_bytes(_serialize(tensors))
        found = read_network(path, activation=RELU)
        np.testing.assert_array_equal(found.layers[0].to_scipy().toarray(), dense.T)


def _serialize(tensors: dict[str, np.ndarray]) -> bytes:
    """`safetensors.numpy.save` knows no bfloat16."""
    codes = {"float16": "F16", "bfloat16": "BF16", "float64": "F64", "int8": "I8", "int64": "I64"}
    header, content = {}, b""
    for name, array in tensors.items():
        end = len(content) + array.nbytes
        header[name] = {
            "dtype": codes[array.dtype.name],
            "shape": array.shape,
            "data_offsets": [len(content), end],
        }
        content += array.tobytes()
    encoded = json.dumps(header).encode()
    return len(encoded).to_bytes(8, "little") + encoded + content


# --- network files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_network_files_hold_all_that_a_network_is(tmp_path: Path, network: SparseNetwork, packed: bool) -> None:
    path = tmp_path / "network.safetensors"
    network.save(path)
    if packed:
        path.write_bytes(gzip.compress(path.read_bytes()))
    found = read_network(path)
    assert found.activation == network.activation
    assert_equal(found, network)
    assert read_network(path, activation=RELU).activation == (RELU,) * 3
    with pytest.raises(ValueError, match="leave out biases"):
        read_network(path, biases=0.5)


# --- files that are not what they claim -------------------------------------------------------------------------------

SP = saved(sp.save_npz, sp.eye_array(3, format="csr"))
WRONG_INDICES = saved(
    np.savez, format=np.array(b"csr"), shape=[2, 2], data=np.ones(2), indices=[0, 9], indptr=[0, 1, 2]
)
PLAN = safetensors.numpy.save({"words": np.ones(3, np.uint32)}, {"format": "spdnn_jax plan 1"})
CSR = {"fc.weight.crow_indices": np.array([0, 1, 2]), "fc.weight.values": np.ones(2, np.float32)}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "m.npz",
            b"not a zip",
            r"as a sparse matrix of SciPy .*: write it with scipy\.sparse\.save_npz",
        ),
        ("m.npz", b"", r"cannot be read as a sparse matrix of SciPy .*save_npz"),
        ("m.npz", SP[:-40], r"cannot be read as a sparse matrix of SciPy .*save_npz"),
        ("m.npz", saved(np.savez, a=np.ones(3)), r"cannot be read as a sparse matrix of SciPy .*save_npz"),
        ("m.npz", WRONG_INDICES, "indices must be < 2"),
        ("m.npz", gzip.compress(SP, mtime=0)[:-20], "the gzip stream is corrupt or cut short .*: fetch the file again"),
        ("m.mtx", b"1 1 1\n", "cannot be read as a Matrix Market file .*: write it with scipy.io.mmwrite"),
        ("m.tsv", b"1 2 0.5\n", "line 1: expected two whole numbers and a number with tabs between"),
        ("m.tsv", b"1\t2\t0.5\n2\t0\t1\n", "line 2: the second neuron is 0, but they count from 1: pass index_base=0"),
        ("m.tsv", b"1\t2\t0.5\n1\t2\t1\n", "stored twice: pass duplicates='sum'"),
        ("m.tsv", b"1\t2\tnan\n", "weight 0 is nan"),
        ("m.tsv", b"", "the file is empty"),
        ("m.tsv", b"1\t2\t0.5", "the file is cut short"),
        ("m.pt", b"PK\3\4", r"pickles are not read: write the state dict with safetensors\.torch\.save_file"),
        ("m.safetensors", b"", r"cannot be read as a safetensors file .*: write it with"),
        ("m.safetensors", b"\x99" * 100, r"cannot be read as a safetensors file .*: write it with"),
        ("m.safetensors", safetensors.numpy.save({"fc.weight": np.ones((2, 2))})[:-9], "as a safetensors file"),
        ("m.safetensors", safetensors.numpy.save({"fc.weight": np.ones(3)}), r"expected a matrix, found shape \(3,\)"),
        ("m.safetensors", safetensors.numpy.save({"fc.bias": np.ones(3)}), r"no tensor is called \*weight"),
        (
            "m.safetensors",
            safetensors.numpy.save({"words": np.ones(3, np.uint32)}, {"format": "spdnn_jax plan 1"}),
            "is a plan, not a network",
        ),
        ("m.safetensors", safetensors.numpy.save(CSR), r"there is no tensor fc\.weight\.col_indices"),
        (
            "m.safetensors",
            safetensors.numpy.save(CSR | {"fc.weight.col_indices": np.array([0, -1])}),
            "indices must be >= 0",
        ),
        (
            "m.safetensors",
            safetensors.numpy.save(
                CSR | {"fc.weight.col_indices": np.array([0, 5]), "fc.weight.shape": np.array([2, 3])}
            ),
            "names input 5, but there are 3",
        ),
    ],
)
def test_a_file_that_is_not_what_it_claims(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    """One line that names the file and the cure."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_network(path, activation=RELU)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file: check the path"):
        read_network(tmp_path / "absent.npz", activation=RELU)
    with pytest.raises(FileNotFoundError, match="the folder holds no files"):
        read_network(tmp_path, activation=RELU)
    with pytest.raises(FileNotFoundError, match="no file was named"):
        read_network([], activation=RELU)
    path = tmp_path / "m.npz"
    path.write_bytes(SP)
    with pytest.raises(ValueError, match=r"m\.npz: does not say what follows a layer: pass activation, such as"):
        read_network(path)
    with pytest.raises(ValueError, match="index_base must be 0 or 1, got 2"):
        read_network(path, index_base=2, activation=RELU)
    with pytest.raises(ValueError, match="2 activations were given, but there are 1 layers"):
        read_network(path, activation=[RELU, RELU])
    random_network(0, [3, 2]).save(tmp_path / "network.safetensors")
    with pytest.raises(ValueError, match="are no single layers"):
        read_network([path, tmp_path / "network.safetensors"], activation=RELU)


def test_duplicates_may_be_summed(tmp_path: Path) -> None:
    path = tmp_path / "m.tsv"
    path.write_text("1\t2\t0.5\n1\t2\t1\n")
    found = read_network(path, activation=RELU, duplicates="sum")
    assert found.layers[0].to_scipy().toarray().tolist() == [[0, 1.5]]


def test_the_trained_network(tmp_path: Path, shared_data: Path) -> None:
    """Real files: dense lists and edges from 0, biases beside them, ReLU up to 1 and then logits."""
    with tarfile.open(shared_data / "trained/mnist-128x18.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    files = tmp_path / "mnist-128x18"
    activation = [Clip.relu(1)] * 19 + [Clip.identity()]
    network = read_network(files / "weights", biases=files / "biases", index_base=0, activation=activation)
    assert [layer.shape for layer in network.layers] == [(784, 128), *[(128, 128)] * 18, (128, 10)]
    assert network.activation[-1].upper == math.inf


@pytest.mark.parametrize(
    "content", [b"1\t2000000000\t1\n", b"%%MatrixMarket matrix coordinate real general\n9 2000000000 1\n1 1 1\n"]
)
def test_outputs_that_no_edges_fill_are_refused(tmp_path: Path, content: bytes) -> None:
    """A few bytes that ask for 16 GB of row pointers."""
    (tmp_path / "w").write_bytes(content)
    with pytest.raises(ValueError, match="w: 2,000,000,000 outputs with 1 edges, too many and empty to be a layer"):
        read_network(tmp_path / "w", activation=RELU)
