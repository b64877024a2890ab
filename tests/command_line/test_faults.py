"""Machines that are full, locked down or spoken to in ASCII, and programs that are killed: whole files or none."""

import functools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from spdnn_jax import SparseNetwork
from spdnn_jax.command_line.report import read_reports
from spdnn_jax.graph_challenge import networks, official_files, radixnet
from spdnn_jax.graph_challenge.download import download
from tests.command_line.program import SMALL, error_line, refused
from tests.graph_challenge.test_download import CONTENT, Server, names, server, url  # noqa: F401
from tests.graph_challenge.test_official_files import NEURONS, write_archive

PROGRAM = [sys.executable, "-P", "-m", "spdnn_jax"]


def test_no_home_no_locale_and_paths_of_all_kinds(tmp_path: Path) -> None:
    """In a shell that says C, where no cache and no temporary folder is to be had."""
    folder = tmp_path / "Ränder mit Leerzeichen 层"
    folder.mkdir()
    report, categories = folder / "r é.json", folder / "c ü.tsv"
    environment = {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "HOME": "/dev/null/none",
        "TMPDIR": "/dev/null/none", "XDG_CACHE_HOME": "/dev/null/none", "PATH": "",
    }  # fmt: skip
    flags = [*SMALL, f"--report_out={report}", f"--categories_out={categories}"]
    done = subprocess.run([*PROGRAM, *flags], cwd=folder, env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(networks.read_categories(categories)) == read_reports([report])[0]["categories"]
    assert len(list(folder.iterdir())) == 2


def in_small_folder(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the program with a folder that holds 64 KiB, in a namespace of its own; then lists the folder."""
    script = 'mount -t tmpfs -o size=64k tmpfs "$0" && { "$@"; code=$?; ls -A "$0"; exit $code; }'
    command = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@functools.cache
def has_namespaces() -> bool:
    return shutil.which("unshare") is not None and in_small_folder(Path("/mnt"), "true").returncode == 0


@pytest.mark.skipif(not has_namespaces(), reason="no private namespaces here")
def test_a_full_disk_is_named_and_left_clean(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l{number}.tsv" for number in range(1, 41)])
    flags = [f"--neurons={NEURONS}", "--layers=40", f"--dataset_dir={tmp_path}", f"--output={full}/network"]
    done = in_small_folder(full, *PROGRAM, "convert", *flags)
    assert f"{full}/network: No space left on device" in error_line(done)
    assert done.stdout == ""


def test_a_part_file_of_the_user_s_own_stays(tmp_path: Path) -> None:
    own = tmp_path / "network.part"
    own.write_bytes(b"mine")
    write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l1.tsv"])
    flags = [f"--neurons={NEURONS}", "--layers=1", f"--dataset_dir={tmp_path}", f"--output={tmp_path}/network"]
    assert refused("convert", *flags).returncode == 0
    assert own.read_bytes() == b"mine"
    assert names(tmp_path) == ["network", "network.part", f"neuron{NEURONS}.tar.gz"]


def killed_when(ready: Path, program: str, *arguments: object) -> None:
    """Kills a Python program as soon as a file is there."""
    process = subprocess.Popen([sys.executable, "-P", "-c", program, *map(str, arguments)])
    while not ready.exists():
        assert process.poll() is None, "it ended"
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL


def test_a_conversion_that_was_killed_is_made_again(tmp_path: Path) -> None:
    program = """
import pathlib, sys, time
from spdnn_jax.graph_challenge import official_files
def killed(done):
    if done == 2:
        pathlib.Path(sys.argv[3]).touch()
        time.sleep(60)
official_files.convert(sys.argv[1], 64, 3, sys.argv[2], killed)
"""
    write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l{number}.tsv" for number in (1, 2, 3)])
    output, ready = tmp_path / "network", tmp_path / "ready"
    output.write_bytes(b"old")
    killed_when(ready, program, tmp_path, output, ready)
    assert output.read_bytes() == b"old"
    official_files.convert(tmp_path, NEURONS, 3, output)
    assert len(SparseNetwork.load(output).layers) == 3
    np.testing.assert_array_equal(SparseNetwork.load(output).layers[2].bias, np.float32(radixnet.bias(NEURONS)))


def test_a_download_that_was_killed_goes_on(server: Server, tmp_path: Path) -> None:  # noqa: F811
    program = """
import pathlib, sys, time
from spdnn_jax.graph_challenge.download import download
def killed(name, done, total):
    if done > 1_000_000:
        pathlib.Path(sys.argv[3]).touch()
        time.sleep(60)
download(sys.argv[1], pathlib.Path(sys.argv[2]), progress=killed)
"""
    target, ready = tmp_path / "folder" / "file", tmp_path / "ready"
    target.parent.mkdir()
    killed_when(ready, program, url(server), target, ready)
    assert not target.exists()
    download(url(server), target)
    assert target.read_bytes() == CONTENT
    assert server.requests[-1]["Range"] is not None
    assert names(target.parent) == ["file"]
