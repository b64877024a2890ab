"""The examples, on a small size, as a person runs them; and that they are as short as they are said to be."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, *arguments: object, folder: Path, devices: int = 1) -> str:
    """What an example prints, run in a folder of its own."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
    }
    done = subprocess.run(
        [sys.executable, "-P", EXAMPLES / f"{name}.py", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=folder,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "lines"), [("trained", 12), ("sharded", 15), ("challenge", 10)])
def test_short(name: str, lines: int) -> None:
    """Lines of code: neither blank, nor comments, nor the docstring."""
    _, _, code = (EXAMPLES / f"{name}.py").read_text().split('"""', 2)
    assert len([line for line in code.splitlines() if line.strip() and not line.startswith("#")]) <= lines


def test_every_example_is_run() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"trained", "finetune", "sharded", "challenge"}


def test_trained(tmp_path: Path, shared_data: Path) -> None:
    """The published accuracy, which needs a last layer without activation."""
    assert run("trained", shared_data.resolve(), folder=tmp_path) == "9,494 of 10,000 images\n"


def test_finetune(tmp_path: Path) -> None:
    """Within a point of the dense accuracy; pruning alone is not."""
    pytest.importorskip("flax")
    pytest.importorskip("optax")
    printed = run("finetune", 128, 20, folder=tmp_path)
    dense, pruned, tuned = (float(percent) for percent in re.findall(r"([\d.]+)%", printed.replace("10% of", "")))
    assert dense > 95
    assert pruned < dense - 1
    assert tuned >= dense - 1
    edges = int(re.search(r"fine-tuned, ([\d,]+) edges", printed)[1].replace(",", ""))  # pyright: ignore[reportOptionalSubscript]
    assert edges == pytest.approx(0.1 * (64 * 128 + 128 * 128 + 128 * 10), abs=3)


def test_sharded(tmp_path: Path) -> None:
    printed = run("sharded", 64, 6, 200, folder=tmp_path, devices=4)
    assert "3: features 150 to 200" in printed  # of a device that jax before 0.10 calls TFRT_CPU_3
    assert "200 features on 4 devices, equal to those of one" in printed


def test_challenge(tmp_path: Path) -> None:
    assert re.fullmatch(r"\d+ categories, \d+\.\d\d nominal TE/s\n", run("challenge", 64, 6, 200, folder=tmp_path))
