"""The command `run`, end to end."""

import json
import re
import shutil
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from spdnn_jax.command_line import memory, run
from spdnn_jax.graph_challenge import networks, official_files, radixnet
from tests.command_line.program import SMALL, error_line, refused, spdnn, started
from tests.graph_challenge.test_official_files import write_network


def test_run_reports_checks_and_writes(tmp_path: Path) -> None:
    report, categories = tmp_path / "report.json", tmp_path / "categories.tsv"
    done = started(*SMALL, "--check=full", f"--report_out={report}", f"--categories_out={categories}")
    assert done.returncode == 0, done.stderr
    for expected in (
        "network",
        "64 x 6",
        "nominal",
        "active",
        "layer 1: ",
        "equal the float64 oracle's",
        "0 close calls",
    ):
        assert expected in done.stdout
    content = json.loads(report.read_text())
    assert content["features"] == 200
    assert len(content["active"]) == 6
    assert len(content["inference_seconds"]) == 2
    assert content["edges"] == 6 * 64 * 32
    assert content["nominal_edges_per_second"] == pytest.approx(200 * 6 * 64 * 32 / content["seconds"]["inference"])
    assert content["versions"]["jax"]
    assert content["largest_difference"] < 1e-4
    assert content["close_calls"] == 0
    assert len(networks.read_categories(categories)) == content["categories"] == content["active"][-1]


def test_truth_decides_the_exit_code(tmp_path: Path) -> None:
    truth = tmp_path / "truth.tsv"
    assert spdnn(*SMALL, f"--categories_out={truth}").returncode == 0
    same = spdnn(*SMALL, f"--truth={truth}")
    assert same.returncode == 0
    assert "0 beside them" in same.stdout
    truth.write_text(truth.read_text() + "199\n200\n" if "200" not in truth.read_text() else "1\n")
    other = spdnn(*SMALL, f"--truth={truth}")
    assert other.returncode == 1
    assert "DIFFERS" in other.stdout
    assert "generated weights are not the official ones" in other.stdout
    assert "spdnn download --neurons=64" in other.stdout


@pytest.mark.parametrize("backend", ["xla", "cpu", "auto"])
def test_back_ends(backend: str) -> None:
    done = spdnn(*SMALL, f"--backend={backend}", "--check=full", "--inputs=random")
    assert done.returncode == 0, done.stderr


def test_official_files_converted_and_not(tmp_path: Path) -> None:
    write_network(tmp_path, layers=6)
    (tmp_path / "sparse-images-64.tsv").write_text("".join(f"{f}\t{f % 64 + 1}\t1\n" for f in range(1, 201)))
    network = tmp_path / "network.safetensors"
    done = spdnn("convert", "--neurons=64", "--layers=6", f"--dataset_dir={tmp_path}", f"--output={network}")
    assert done.returncode == 0, done.stderr
    assert str(network) in done.stdout
    for source in (tmp_path, network):
        done = spdnn(*SMALL, "--weights=official", f"--dataset_dir={source}", "--inputs=official", "--check=full")
        assert done.returncode == 0, done.stderr
        assert "equal the float64 oracle's" in done.stdout


def test_the_archive_itself_and_its_truth(tmp_path: Path) -> None:
    """Where nothing but official files is used, a truth that differs is no matter of other inputs."""
    packed, truth = tmp_path / "neuron64.tar.gz", tmp_path / "truth.tsv"
    network = write_network(tmp_path, layers=6)
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(network, network.name)
    shutil.rmtree(network)
    (tmp_path / "sparse-images-64.tsv").write_text("".join(f"{f}\t{f % 64 + 1}\t1\n" for f in range(1, 201)))
    truth.write_text("1\n2\n")
    official = ("--weights=official", f"--dataset_dir={packed}", f"--truth={truth}")
    done = spdnn(*SMALL, *official, "--inputs=official", "--check=full")
    assert done.returncode == 1, done.stderr
    assert "equal the float64 oracle's" in done.stdout
    assert "DIFFERS: 0 of the file's 2 categories found" in done.stdout
    assert "cannot be met" not in done.stdout
    assert "--inputs=random are other features" in spdnn(*SMALL, *official, "--inputs=random").stdout


def test_the_challenge_on_official_weights_and_mnist(shared_data: Path) -> None:
    """The whole way at the real width: official weights, MNIST inputs, the oracle's categories."""
    done = spdnn(
        "--neurons=1024", "--layers=120", "--features=4000", "--backend=cpu", "--repeats=1", "--check=full",
        "--weights=official", f"--dataset_dir={shared_data}/graph-challenge",
        "--inputs=mnist", f"--mnist_dir={shared_data}/mnist",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "categories of 4,000 features equal the float64 oracle's" in done.stdout


def test_what_cannot_fit_is_refused_before_anything_is_prepared() -> None:
    """65,536 x 1,920 prepared inputs for minutes, and then there was no memory."""
    done = refused(*SMALL, "--features=2000000000")
    assert "2,000,000,000 features of 64 neurons need 238.4 GiB of this machine's memory" in error_line(done)
    assert "are available: lower --features, or share the features between machines" in done.stderr
    assert "building the plan" not in done.stderr


def test_much_memory_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda: 1 << 40)
    monkeypatch.setattr(run, "_build_plan", mock.Mock(side_effect=ValueError("so far")))
    done = refused("--neurons=65536", "--layers=1920", "--backend=cpu", "--features=60000")
    assert "spdnn: features need 7.3 GiB and the plan at least 0.5 GiB of memory; 1,024.0 GiB are" in done.stderr
    assert "spdnn: error: so far" in done.stderr


def test_a_long_inference_says_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_LONG_WORK", 0)
    monkeypatch.setattr(run, "_SAMPLE_OF_CORE", 1)
    monkeypatch.setattr(run, "_runner", mock.Mock(side_effect=ValueError("so far")))
    done = refused(*SMALL)
    assert re.search(r"spdnn: an inference will take about \d+ seconds; 3 will be made \(--repeats\)", done.stderr)


def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was needed and the flags that help, not with a traceback."""
    monkeypatch.setattr(run, "_build_plan", mock.Mock(side_effect=MemoryError("Unable to allocate 9 TiB")))
    said = error_line(refused(*SMALL))
    assert "out of memory: Unable to allocate 9 TiB: lower --stream_features, --stream_layers, or --features" in said


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ((), "2 of 1 processes"),
        (("--stream_layers=4",), "streamed, 4 layers at a time"),
        (("--stream_features=90",), "3: the features do not fit"),
        (("--rebalance_after=2",), "the fullest has"),
    ],
)
def test_several_devices(cut: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However a run is spread and cut, the report must add up to the whole and agree with the oracle."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    path = tmp_path / "report.json"
    done = spdnn(*SMALL, "--neurons=256", "--devices=2", "--check=full", f"--report_out={path}", *cut)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
    report = json.loads(path.read_text())
    assert report["check"] == "categories of 200 features equal the float64 oracle's"
    assert np.asarray(report["active_of_devices"]).sum(axis=0).tolist() == report["active"]
    assert report["active"][0] > 100


@pytest.mark.parametrize("inputs", ["mnist", "official"])
def test_missing_inputs_are_noticed_before_the_plan_is_built(tmp_path: Path, inputs: str) -> None:
    """Building the plan of a large network takes minutes."""
    done = refused(*SMALL, f"--inputs={inputs}", f"--mnist_dir={tmp_path}", f"--dataset_dir={tmp_path}")
    assert f"{tmp_path} holds no " in error_line(done)
    assert "building the plan" not in done.stderr


def test_malformed_files_end_in_one_line(tmp_path: Path) -> None:
    network = write_network(tmp_path, layers=2)
    broken = network / "n64-l2.tsv"
    broken.write_text(broken.read_text()[:-20])
    outputs = tmp_path / "out"
    outputs.mkdir()
    done = refused(
        "--neurons=64", "--layers=2", "--features=9", "--backend=cpu",
        "--weights=official", f"--dataset_dir={tmp_path}",
        f"--report_out={outputs}/report.json", f"--categories_out={outputs}/categories.tsv",
    )  # fmt: skip
    assert "n64-l2.tsv, line" in error_line(done)
    converted = refused("convert", "--neurons=64", "--layers=2", f"--dataset_dir={tmp_path}", f"--output={outputs}/n")
    assert "n64-l2.tsv, line" in error_line(converted)
    assert not list(outputs.iterdir()), "nothing half-written is left behind"


def test_features_of_another_width_are_named(tmp_path: Path) -> None:
    write_network(tmp_path, layers=1)
    (tmp_path / "sparse-images-64.tsv").write_text("1\t65\t1\n")
    done = refused(*SMALL, "--layers=1", "--inputs=official", f"--dataset_dir={tmp_path}")
    assert "line 1: pixel 65 does not exist" in error_line(done)


def test_reading_is_lazy() -> None:
    """A network of 1,920 layers must not be held in memory: the first layer comes without the others."""
    assert next(radixnet.layers(1024, 1920)).edges == 32768
    assert isinstance(np.asarray(next(iter(radixnet.layers(64, 1))).values), np.ndarray)
    assert not isinstance(official_files.layers("/nowhere", 64, 1), list)
