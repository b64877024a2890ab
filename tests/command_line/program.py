"""The program, called as a person calls it."""

import os
import subprocess
import sys

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
