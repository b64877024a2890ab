"""What the program accepts, and what it says of mistakes."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import spdnn_jax
from spdnn_jax.command_line import app, options
from spdnn_jax.graph_challenge import networks
from tests.command_line.program import error_line, refused, spdnn, started


@pytest.mark.parametrize(
    "arguments",
    [
        ("--stream_layers=0",),
        ("--stream_features=some",),
        ("--rebalance_after=2", "--stream_layers=3"),
        ("--neurons=many",),
        ("--layers=0",),
        ("--features=0",),
        ("--features=9223372036854775808",),
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
        ("--report_out=/tmp/one", "--categories_out=/tmp/../tmp/one"),
    ],
)
def test_bad_flags_exit_with_2(arguments: tuple[str, ...]) -> None:
    done = refused(*arguments)
    assert done.returncode == 2, done.stderr
    assert "FATAL" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_flagfile_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "flags"
    path.write_bytes(bytes(range(256)))
    done = refused(f"--flagfile={path}")
    assert done.returncode == 2
    assert done.stderr.startswith("FATAL Flags parsing error")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices=99", "--neurons=64", "--features=10"), "99 devices were asked for"),
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


@pytest.mark.parametrize("neurons", networks.NEURONS)
@pytest.mark.parametrize("layers", networks.LAYERS)
def test_flagfiles_of_the_challenge(neurons: int, layers: int) -> None:
    path = Path(__file__).resolve().parents[2] / "configs" / f"{neurons}x{layers}.flags"
    lines = path.read_text().splitlines()
    assert {f"--neurons={neurons}", f"--layers={layers}", "--features=60000"} <= set(lines)


def test_help_tells_the_commands() -> None:
    for done in (started("-h"), refused("--help")):
        assert done.returncode == 0, done.stderr
        assert {line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")} == set(app._COMMANDS)


@pytest.mark.parametrize(
    ("command", "taken", "not_taken"),
    [
        ("run", {"neurons", "truth", "backend"}, {"output", "figure"}),
        ("bench", {"neurons", "report_out"}, {"output"}),
        ("convert", {"neurons", "output"}, {"truth", "seed"}),
        ("download", {"base_url", "dataset_dir"}, {"output", "seed"}),
        ("plot", {"figure", "output"}, {"neurons"}),
        ("doctor", set(), {"neurons"}),
    ],
)
def test_help_of_a_command_tells_its_flags_alone(command: str, taken: set[str], not_taken: set[str]) -> None:
    text = app._help(command)
    told = set(re.findall(r"^  --(\w+)", text, re.MULTILINE))
    assert taken <= told
    assert not told & not_taken
    assert told <= {flag.name for flag in options.defined()}
    assert text.startswith(f"spdnn {command}")


def test_help_goes_before_mistakes() -> None:
    done = refused("convert", "--no_such_flag", "--help")
    assert done.returncode == 0, done.stderr
    assert "--dataset_dir" in done.stdout
    assert "--seed" not in done.stdout


def test_version() -> None:
    done = refused("--version")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"spdnn_jax {spdnn_jax.__version__}, jax ")


def test_core_alone_says_which_extra_is_missing() -> None:
    """The core installs with jax, jaxlib, numpy and absl-py alone."""
    program = """
import sys
for name in ("sklearn", "tqdm", "safetensors", "matplotlib"):
    sys.modules[name] = None
import numpy as np
import spdnn_jax
assert "scipy" not in sys.modules, "what most programs do not need makes the import slow"
from spdnn_jax.graph_challenge import inputs, radixnet
from spdnn_jax.command_line import plots
from spdnn_jax.command_line.progress import progress_bar
plan = spdnn_jax.build_plan(radixnet.layers(64, 3))
assert spdnn_jax.categories(plan, inputs.random(64, 5)).shape == (5,)
with progress_bar("work", 1):
    pass
read = lambda: spdnn_jax.Plan.load(spdnn_jax.__file__)
for call in (lambda: inputs.digits(64, 5), read, lambda: plots.plot_layers([], "x.png")):
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
