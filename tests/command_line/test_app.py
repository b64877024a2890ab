"""The command line, end to end, as a person calls it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from spdnn_jax.graph_challenge import download, networks, official_files, radixnet
from tests.graph_challenge.test_official_files import write_network

SMALL = ("--neurons=64", "--layers=6", "--features=200", "--backend=cpu", "--repeats=2")


def spdnn(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, "-m", "spdnn_jax", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failing command says, its progress notes aside."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("spdnn: error: ")
    return lines[0]


def test_run_reports_checks_and_writes(tmp_path: Path) -> None:
    report, categories = tmp_path / "report.json", tmp_path / "categories.tsv"
    done = spdnn(*SMALL, "--check=full", f"--report_out={report}", f"--categories_out={categories}")
    assert done.returncode == 0, done.stderr
    for expected in ("network", "64 x 6", "nominal", "active", "after layer 1 ", "equal the float64 oracle's"):
        assert expected in done.stdout
    content = json.loads(report.read_text())
    assert content["features"] == 200
    assert len(content["active"]) == 6
    assert len(content["inference_seconds"]) == 2
    assert content["edges"] == 6 * 64 * 32
    assert content["nominal_edges_per_second"] == pytest.approx(200 * 6 * 64 * 32 / content["seconds"]["inference"])
    assert content["versions"]["jax"]
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


def test_the_challenge_on_official_weights_and_mnist(shared_data: Path) -> None:
    """The whole way at the real width: official weights, MNIST inputs, the oracle's categories."""
    done = spdnn(
        "--neurons=1024", "--layers=120", "--features=4000", "--backend=cpu", "--repeats=1", "--check=full",
        "--weights=official", f"--dataset_dir={shared_data}/graph-challenge",
        "--inputs=mnist", f"--mnist_dir={shared_data}/mnist",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "categories of 4,000 features equal the float64 oracle's" in done.stdout


def test_profile_and_plot(tmp_path: Path) -> None:
    report, figure = tmp_path / "report.json", tmp_path / "figure.png"
    done = spdnn(*SMALL, "--profile_layers", f"--report_out={report}")
    assert "layer 1 alone" in done.stdout
    content = json.loads(report.read_text())
    assert [layer["features"] for layer in content["profile"]] == [200, *content["active"][:-1]]
    for kind in ("layers", "networks"):
        done = spdnn("plot", str(report), f"--output={figure}", f"--figure={kind}")
        assert done.returncode == 0, done.stderr
        assert figure.read_bytes().startswith(b"\x89PNG")
        figure.unlink()


def test_too_little_memory_is_said(tmp_path: Path) -> None:
    """With what was needed and the flags that help, not with a traceback."""
    done = spdnn(*SMALL, "--features=10000000000000")
    assert done.returncode == 1
    assert "spdnn: error: out of memory: Unable to allocate" in done.stderr
    assert "lower --stream_features, --stream_layers, or --features" in done.stderr
    assert "Traceback" not in done.stderr


def test_bench_gathers_reports(tmp_path: Path) -> None:
    flagfile = tmp_path / "small.flags"
    flagfile.write_text("\n".join(SMALL) + "\n")
    gathered = tmp_path / "all.json"
    done = spdnn("bench", str(flagfile), str(flagfile), "--check=none", f"--report_out={gathered}")
    assert done.returncode == 0, done.stderr
    assert [report["features"] for report in json.loads(gathered.read_text())] == [200, 200]


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


@pytest.mark.parametrize(
    "arguments",
    [
        ("--stream_layers=0",),
        ("--stream_features=some",),
        ("--rebalance_after=2", "--stream_layers=3"),
        ("--neurons=many",),
        ("--layers=0",),
        ("--features=0",),
        ("--weights=best",),
        ("--compress=all",),
        ("--no_such_flag",),
        ("--flagfile=/no/such/file",),
        ("--weights=official",),
        ("--inputs=mnist",),
        ("fly",),
        ("run", "away"),
        ("convert",),
        ("download",),
        ("plot",),
        ("bench",),
    ],
)
def test_bad_flags_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = spdnn(*arguments)
    assert done.returncode == 2, done.stderr
    assert "FATAL" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices=99",), "99 devices were asked for"),
        (("--neurons=1000",), r"16 * 2^k"),
        (("--neurons=2048",), "square number"),
        (("--weights=official", "--dataset_dir=/no/such"), "point --dataset_dir at the official files"),
        (("--inputs=mnist", "--mnist_dir=/no/such"), "--mnist_dir"),
        (("--report_out=/no/such/report.json",), "the folder /no/such does not exist"),
        (("--categories_out=/",), "cannot be written"),
        (("--truth=/no/such/truth.tsv",), "/no/such/truth.tsv"),
        (("plot", "/no/such.json", "--output=/tmp/x.png"), "/no/such.json"),
        (("--backend=cuda",), "--backend=cuda cannot be used"),
    ],
)
def test_user_mistakes_end_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    command, flags = (arguments[:1], arguments[1:]) if arguments[0] == "plot" else ((), arguments)
    assert message in error_line(spdnn(*command, "--backend=cpu", *flags))


@pytest.mark.parametrize("inputs", ["mnist", "official"])
def test_missing_inputs_are_noticed_before_the_plan_is_built(tmp_path: Path, inputs: str) -> None:
    """Building the plan of a large network takes minutes."""
    done = spdnn(*SMALL, f"--inputs={inputs}", f"--mnist_dir={tmp_path}", f"--dataset_dir={tmp_path}")
    assert f"{tmp_path} holds no " in error_line(done)
    assert "building the plan" not in done.stderr


def test_malformed_files_end_in_one_line(tmp_path: Path) -> None:
    network = write_network(tmp_path, layers=2)
    broken = network / "n64-l2.tsv"
    broken.write_text(broken.read_text()[:-20])
    outputs = tmp_path / "out"
    outputs.mkdir()
    done = spdnn(
        "--neurons=64", "--layers=2", "--features=9", "--backend=cpu",
        "--weights=official", f"--dataset_dir={tmp_path}",
        f"--report_out={outputs}/report.json", f"--categories_out={outputs}/categories.tsv",
    )  # fmt: skip
    assert "n64-l2.tsv, line" in error_line(done)
    converted = spdnn("convert", "--neurons=64", "--layers=2", f"--dataset_dir={tmp_path}", f"--output={outputs}/n")
    assert "n64-l2.tsv, line" in error_line(converted)
    assert not list(outputs.iterdir()), "nothing half-written is left behind"


def test_features_of_another_width_are_named(tmp_path: Path) -> None:
    write_network(tmp_path, layers=1)
    (tmp_path / "sparse-images-64.tsv").write_text("1\t65\t1\n")
    done = spdnn(*SMALL, "--layers=1", "--inputs=official", f"--dataset_dir={tmp_path}")
    assert "line 1: pixel 65 does not exist" in error_line(done)


def test_download_reaches_a_server(tmp_path: Path) -> None:
    done = spdnn("download", "--neurons=64", "--base_url=http://127.0.0.1:9", f"--dataset_dir={tmp_path}/new")
    assert "http://127.0.0.1:9/dnn/neuron64.tar.gz" in error_line(done)
    assert download.official_paths(64, 120)[0] == "dnn/neuron64.tar.gz"


@pytest.mark.parametrize("neurons", networks.NEURONS)
@pytest.mark.parametrize("layers", networks.LAYERS)
def test_flagfiles_of_the_challenge(neurons: int, layers: int) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / f"{neurons}x{layers}.flags"
    lines = path.read_text().splitlines()
    assert {f"--neurons={neurons}", f"--layers={layers}", "--features=60000"} <= set(lines)


def test_core_alone_says_which_extra_is_missing() -> None:
    """The core installs with jax, jaxlib, numpy and absl-py alone."""
    program = """
import sys
for name in ("sklearn", "tqdm", "safetensors", "matplotlib"):
    sys.modules[name] = None
import numpy as np
import spdnn_jax
from spdnn_jax.graph_challenge import inputs, radixnet
from spdnn_jax.command_line import report
plan = spdnn_jax.build_plan(radixnet.layers(64, 3))
assert spdnn_jax.categories(plan, inputs.random(64, 5)).shape == (5,)
with report.progress_bar("work", 1):
    pass
for call in (lambda: inputs.digits(64, 5), lambda: plan.save("x"), lambda: report.plot_layers([], "x.png")):
    try:
        call()
    except ImportError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "pip install 'spdnn_jax[data]'" in lines[0]
    assert "pip install 'spdnn_jax[data]'" in lines[1]
    assert "pip install 'spdnn_jax[plot]'" in lines[2]


def test_reading_is_lazy() -> None:
    """A network of 1,920 layers must not be held in memory: the first layer comes without the others."""
    assert next(radixnet.layers(1024, 1920)).edges == 32768
    assert isinstance(np.asarray(next(iter(radixnet.layers(64, 1))).values), np.ndarray)
    assert not isinstance(official_files.layers("/nowhere", 64, 1), list)
