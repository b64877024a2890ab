"""A network of one's own on the command line: any file, any inputs, and the accuracy where labels are given."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse as sp

from spdnn_jax import Clip, SparseNetwork, build_plan, infer
from spdnn_jax.io import read_network
from tests.command_line.program import error_line, refused, spdnn, started
from tests.conftest import random_network

RUN = ("--backend=cpu", "--repeats=1")


@pytest.fixture
def network() -> SparseNetwork:
    return random_network(0, [9, 12, 5], activation=[Clip.relu(2), Clip.identity()])


@pytest.fixture
def y0() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(40, 9)).astype(np.float32)


def labels(network: SparseNetwork, y0: np.ndarray, right: int) -> np.ndarray:
    """Labels of which so many are what the network says."""
    found = np.argmax(np.asarray(infer(build_plan(network), y0)), axis=1)
    found[right:] = (found[right:] + 1) % network.outputs
    return found


def write(network: SparseNetwork, folder: Path, form: str) -> list[str]:
    """The network in some form, and the flags that read it."""
    activation = "--activation=relu:2,identity"
    if form == "network file":
        network.save(folder / "network")
        return [f"--network={folder}/network"]
    if form == "state dict":
        tensors = {}
        for number, layer in enumerate(network.layers):
            tensors |= {f"{number}.weight": layer.to_scipy().toarray().T, f"{number}.bias": np.asarray(layer.bias)}
        safetensors.numpy.save_file(
            {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, folder / "model.safetensors"
        )
        return [f"--network={folder}/model.safetensors", activation]
    paths = []
    for number, layer in enumerate(network.layers):
        paths.append(f"{folder}/layer{number}.{form}")
        matrix = layer.to_scipy()
        np.save(folder / f"bias{number}.npy", layer.bias)
        if form == "npz":
            sp.save_npz(paths[-1], matrix)
        elif form == "mtx":
            scipy.io.mmwrite(paths[-1], matrix.T)
        else:
            edges = zip(*sp.find(matrix), strict=True)
            Path(paths[-1]).write_text("".join(f"{i}\t{j}\t{w}\n" for i, j, w in edges))
    biases = f"--biases={folder}/bias0.npy,{folder}/bias1.npy"
    own = {"mtx": ["--transpose"], "tsv": ["--index_base=0", "--neurons=9"], "npz": []}[form]
    return [f"--network={','.join(paths)}", biases, activation, *own]


@pytest.mark.parametrize("form", ["network file", "state dict", "npz", "mtx", "tsv"])
def test_any_network_runs_and_its_accuracy_is_said(
    tmp_path: Path, network: SparseNetwork, y0: np.ndarray, form: str
) -> None:
    np.save(tmp_path / "y0.npy", y0)
    np.savetxt(tmp_path / "labels.txt", labels(network, y0, right=30), "%d")
    report = tmp_path / "report.json"
    done = spdnn(
        "run", *RUN, *write(network, tmp_path, form), f"--inputs={tmp_path}/y0.npy",
        f"--labels={tmp_path}/labels.txt", "--check=full", f"--report_out={report}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "75.00%: 30 of 40 labels" in done.stdout
    assert "2 layers, 9 inputs, 5 outputs" in done.stdout
    assert "categories of 40 features equal the float64 oracle's" in done.stdout
    content = json.loads(report.read_text())
    assert (content["right"], content["accuracy"], content["features"], content["layers"]) == (30, 0.75, 40, 2)
    assert content["edges"] == network.edges


@pytest.mark.parametrize("form", ["state dict", "tsv"])
def test_convert_takes_any_network(tmp_path: Path, network: SparseNetwork, form: str) -> None:
    target = tmp_path / "converted.safetensors"
    done = spdnn("convert", *write(network, tmp_path, form), f"--output={target}")
    assert done.returncode == 0, done.stderr
    assert f"run it with --network={target}" in done.stdout
    again = read_network(target)
    assert again.activation == network.activation
    for one, other in zip(again.layers, network.layers, strict=True):
        np.testing.assert_array_equal(one.to_scipy().toarray(), other.to_scipy().toarray())
        np.testing.assert_array_equal(one.bias, other.bias)


def test_the_trained_network(tmp_path: Path, shared_data: Path) -> None:
    """Published: 94.94% of the test images. From the files as they were published, to the accuracy."""
    with tarfile.open(shared_data / "trained/mnist-128x18.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    files, mnist = tmp_path / "mnist-128x18", shared_data / "mnist"
    done = started(
        *RUN, f"--network={files}/weights", f"--biases={files}/biases", "--index_base=0",
        "--activation=relu:1,identity", f"--inputs={mnist}/t10k-images-idx3-ubyte.gz", "--full_scale=255",
        f"--labels={mnist}/t10k-labels-idx1-ubyte.gz",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "94.94%: 9,494 of 10,000 labels" in done.stdout


def test_fewer_features_than_the_file_has(tmp_path: Path, network: SparseNetwork, y0: np.ndarray) -> None:
    np.save(tmp_path / "y0.npy", y0)
    np.save(tmp_path / "labels.npy", labels(network, y0, right=30))
    files = (*write(network, tmp_path, "network file"), f"--inputs={tmp_path}/y0.npy")
    done = spdnn(*RUN, *files, f"--labels={tmp_path}/labels.npy", "--features=32")
    assert "93.75%: 30 of 32 labels" in done.stdout
    assert "holds 40 features, 41 were asked for" in error_line(spdnn(*RUN, *files, "--features=41"))


def test_random_inputs_for_any_width(tmp_path: Path, network: SparseNetwork) -> None:
    done = spdnn(*RUN, *write(network, tmp_path, "network file"), "--inputs=random", "--features=20")
    assert done.returncode == 0, done.stderr
    assert "20 (random)" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("--network=x", "--layers=3"),
        ("--network=x", "--activation=relu,relu,identity"),
        ("--network=x", "--activation=tanh"),
        ("--network=x", "--activation=clip:1:0"),
        ("--transpose",),
        ("--inputs=/no/such/file",),
        ("--full_scale=255",),
    ],
)
def test_flags_that_do_not_go_together(arguments: tuple[str, ...]) -> None:
    done = refused(*arguments)
    assert done.returncode == 2, done.stderr
    assert "FATAL" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_do_not_fit_end_in_one_line(tmp_path: Path, network: SparseNetwork, y0: np.ndarray) -> None:
    own = write(network, tmp_path, "network file")
    np.save(tmp_path / "y0.npy", y0)
    np.save(tmp_path / "narrow.npy", y0[:, 1:])
    inputs = f"--inputs={tmp_path}/y0.npy"
    for name, values in {"few": [0] * 39, "big": [5] * 40, "half": [0.5] * 40}.items():
        np.savetxt(tmp_path / name, values)
    for arguments, message in [
        ((f"--inputs={tmp_path}/narrow.npy",), "the features have 8 neurons, the network has 9 inputs"),
        ((inputs, f"--labels={tmp_path}/few"), "few holds 39 labels, but there are 40 features"),
        ((inputs, f"--labels={tmp_path}/big"), "big: label 5 of a network with 5 outputs"),
        ((inputs, f"--labels={tmp_path}/half"), "half: labels are whole numbers from 0 on"),
    ]:
        assert message in error_line(spdnn(*RUN, *own, *arguments))
    sp.save_npz(tmp_path / "m.npz", network.layers[0].to_scipy())
    assert "pass activation, such as Clip.relu() (--activation=relu)" in error_line(
        spdnn(*RUN, f"--network={tmp_path}/m.npz", inputs)
    )
    (tmp_path / "m.mtx").write_text("no matrix")
    line = error_line(spdnn(*RUN, f"--network={tmp_path}/m.mtx", "--activation=relu", inputs))
    assert f"{tmp_path}/m.mtx: cannot be read as a Matrix Market file" in line
