"""The program, called as a person calls it."""

import contextlib
import io
import os
import subprocess
import sys
from unittest import mock

import jax
import pytest
from absl.testing import flagsaver

from spdnn_jax import _interrupts
from spdnn_jax.command_line import app, own

SMALL = ("--neurons=64", "--layers=6", "--features=200", "--backend=cpu", "--repeats=2")


def started(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a process of its own, as a shell does."""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    return subprocess.run(
        [sys.executable, "-m", "spdnn_jax", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        check=False,
    )


def refused(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `started`, for what ends before anything runs: in this process, which is a hundred times as fast."""
    jax.devices()  # --backend=cpu would hide GPUs from tests to come
    for remembered in (own.network, own.features):  # which a process reads once
        remembered.cache_clear()
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["spdnn", *arguments]),
        mock.patch.object(_interrupts, "watch"),  # signals are the tests'
        flagsaver.flagsaver(),
        pytest.raises(SystemExit) as end,
    ):
        app.main()
    return subprocess.CompletedProcess(arguments, int(end.value.code or 0), out.getvalue(), err.getvalue())


def spdnn(*arguments: str) -> subprocess.CompletedProcess[str]:
    """As `started`, in this process, too, unless JAX has a GPU here, which it would run on in spite of its flags."""
    return refused(*arguments) if jax.default_backend() == "cpu" else started(*arguments)


def error_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that a failing command says, its progress notes aside."""
    assert done.returncode == 1, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.endswith("...")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("spdnn: error: ")
    return lines[0]
