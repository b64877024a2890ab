"""Ctrl-C, SIGTERM, and streams that are full or closed: one line at most, the right exit code, nothing left behind."""

import contextlib
import os
import pty
import random
import select
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import FUZZ
from tests.graph_challenge.test_official_files import write_archive

LONG = ("--neurons=1024", "--layers=30", "--features=3000", "--repeats=100000", "--check=none", "--backend=cpu")
SHORT = ("--neurons=256", "--layers=3", "--features=50", "--repeats=1", "--check=none", "--backend=cpu")


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-P", "-m", "spdnn_jax", *arguments]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, text=True, **options)


def wait_for(process: subprocess.Popen[str], text: str) -> None:
    assert process.stderr is not None
    while text not in (line := process.stderr.readline()):
        assert line, "it ended"


def listens(process: subprocess.Popen[str]) -> bool:
    """Whether the process has come so far as to have a handler for SIGTERM."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
    caught = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def interrupt(process: subprocess.Popen[str], number: signal.Signals) -> str:
    began = time.monotonic()
    process.send_signal(number)
    try:
        output, errors = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert "Exception" not in errors
    assert errors.splitlines()[-1] == ("spdnn: interrupted" if number == signal.SIGINT else "spdnn: terminated")
    assert time.monotonic() - began < 20
    return output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("delay", random.Random(0).sample(range(20, 5000), 50) if FUZZ else [100, 700])
def test_an_interrupt_ends_it_at_any_time(number: signal.Signals, delay: int) -> None:
    """In the middle of imports, compiling or native code alike; in XLA's callbacks KeyboardInterrupt was swallowed."""
    process = start(*LONG)
    while not listens(process):  # before, Python is not ours yet
        time.sleep(0.001)
    time.sleep(delay / 1000)
    interrupt(process, number)


def test_an_interrupt_ends_native_work() -> None:
    process = start(*LONG)
    wait_for(process, "inference")
    interrupt(process, signal.SIGINT)


ON_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # from now on Ctrl-C is the terminal's to send
os.execv(sys.executable, [sys.executable, "-P", "-m", "spdnn_jax", *sys.argv[1:]])
"""


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    """Pressed while a progress bar is drawn; the prompt must then begin on a line of its own."""
    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))  # in no columns no bar is drawn
    before = termios.tcgetattr(slave)
    command = [sys.executable, "-c", ON_TERMINAL, *LONG]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    shown = b""
    try:
        while b"inference" not in shown:
            assert select.select([master], [], [], 60)[0], shown
            shown += os.read(master, 1024)
        os.write(master, b"\x03")
        assert process.wait(timeout=20) == 130
        after = termios.tcgetattr(slave)
        os.close(slave)
        with contextlib.suppress(OSError):  # what Linux says at the end
            while part := os.read(master, 1024):
                shown += part
    finally:
        process.kill()
        os.close(master)
    assert after == before
    assert shown.endswith(b"\r\nspdnn: interrupted\r\n")
    assert b"\x1b[?25l" not in shown, "the cursor was hidden"
    assert b"Traceback" not in shown


def test_an_interrupted_conversion_leaves_nothing(tmp_path: Path) -> None:
    names = [f"neuron64/n64-l{number}.tsv" for number in range(1, 3001)]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    write_archive(tmp_path, names)
    output = tmp_path / "network"
    output.write_bytes(b"old")
    arguments = ("--neurons=64", "--layers=3000", f"--dataset_dir={tmp_path}", f"--output={output}")
    process = start("convert", *arguments, env={"TMPDIR": str(temporary), "PATH": ""})
    wait_for(process, "converting")
    interrupt(process, signal.SIGTERM)
    assert not list(temporary.iterdir())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["network", "neuron64.tar.gz", "temporary"]
    assert output.read_bytes() == b"old"


def test_bench_ends_what_it_started(tmp_path: Path) -> None:
    flagfile = tmp_path / "long.flags"
    flagfile.write_text("\n".join(LONG))
    process = start("bench", str(flagfile))
    wait_for(process, "inference")
    output = interrupt(process, signal.SIGTERM)  # communicate returns: nobody holds the pipes any more
    assert output == ""


def test_a_full_standard_error_loses_words_and_not_the_run() -> None:
    with Path("/dev/full").open("w") as full:
        process = start(*SHORT, stderr=full)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "nominal" in output


def test_a_full_standard_output_is_named() -> None:
    with Path("/dev/full").open("w") as full:
        process = start(*SHORT, stdout=full)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.splitlines()[-1].startswith("spdnn: error: standard output: No space left on device")
    assert "Exception" not in errors


def test_closed_streams_do_not_swallow_files(tmp_path: Path) -> None:
    """The first file that is opened would become standard output, and get what is printed."""
    report = tmp_path / "report.json"
    words = " ".join([sys.executable, "-P", "-m", "spdnn_jax", *SHORT, f"--report_out={report}", ">&- 2>&- <&-"])
    assert subprocess.run(["/bin/sh", "-c", words], check=False).returncode == 0
    assert report.read_text().startswith("{")
