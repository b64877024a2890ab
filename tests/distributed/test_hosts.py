"""Several processes: the same result as one, and an end to all of them when one is lost."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spdnn_jax.distributed import hosts
from spdnn_jax.graph_challenge import inputs, official_files
from tests.command_line.program import error_line, refused
from tests.graph_challenge.test_official_files import write_network

SMALL = ("--neurons=256", "--layers=5", "--features=203", "--inputs=digits", "--check=full", "--repeats=2")

CPUS = {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2",
}


def start(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "spdnn_jax", "--backend=cpu", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | CPUS | environment,
    )


def start_pair(*arguments: str, each: tuple[tuple[str, ...], ...] = ((), ())) -> list[subprocess.Popen[str]]:
    """Two processes of two devices each, on loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = (f"--coordinator_address={address}", "--num_processes=2", *arguments)
    return [start(*flags, *each[number], f"--process_id={number}") for number in range(2)]


def finish(process: subprocess.Popen[str], timeout: int = 120) -> tuple[str, str]:
    try:
        return process.communicate(timeout=timeout)
    finally:
        process.kill()


def into(folder: Path) -> tuple[str, ...]:
    return (*SMALL, f"--categories_out={folder}/categories", f"--report_out={folder}/report")


def outcome(processes: list[subprocess.Popen[str]], folder: Path) -> tuple[str, dict[str, Any]]:
    """The categories and the report of a run."""
    for number, process in enumerate(processes):
        output, errors = finish(process)
        assert process.returncode == 0, errors
        assert ("203 features equal the float64 oracle's" in output) == (number == 0), output
    return (folder / "categories").read_text(), json.loads((folder / "report").read_text())


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("one")
    return outcome([start(*into(folder))], folder)


@pytest.mark.parametrize("cut", [(), ("--stream_layers=2", "--stream_features=77"), ("--rebalance_after=2",)])
def test_two_processes_equal_one(cut: tuple[str, ...], one_process: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    """Each process holds its share alone; the categories must come out whole and in order, and be written once."""
    one, one_report = one_process
    two, two_report = outcome(start_pair(*into(tmp_path), *cut), tmp_path)
    assert one == two
    assert 0 < len(one.splitlines()) < 203
    assert one_report["active"] == two_report["active"]
    assert (two_report["devices"], two_report["processes"]) == (4, 2)
    assert np.asarray(two_report["active_of_devices"]).sum(axis=0).tolist() == one_report["active"]


def test_slurm_says_who_is_who() -> None:
    """As srun starts them: nothing but the environment tells the processes apart."""
    job = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = [
        start(*SMALL, "--coordinator_address=auto", **job, SLURM_PROCID=number, SLURM_LOCALID=number)
        for number in ("0", "1")
    ]
    outputs = [finish(process) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "4 of 2 processes" in outputs[0][0]
    assert "nominal" not in outputs[1][0], "process 0 speaks for all"


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("cause", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_lost_process_ends_the_other(victim: int, cause: signal.Signals) -> None:
    """Collectives wait for ever for a process that died, or that hangs."""
    pair = start_pair(*SMALL, "--repeats=1000000", "--lost_after=5")
    try:
        for process in pair:
            assert process.stderr is not None
            while "inference" not in process.stderr.readline():
                assert process.poll() is None
        pair[victim].send_signal(cause)
        survivor = pair[1 - victim]
        _, errors = finish(survivor, timeout=100)
        assert survivor.returncode == 1
        (line,) = errors.splitlines()
        assert "another process was lost" in line or "lost contact with another process" in line, errors
    finally:
        for process in pair:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [0, 1])
def test_a_process_that_waits_in_vain_says_so(number: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    process = start(
        *SMALL, f"--coordinator_address={address}", "--num_processes=2", f"--process_id={number}", "--lost_after=2"
    )
    _, errors = finish(process)
    assert process.returncode == 1
    assert "the processes did not meet at 127.0.0.1" in errors
    assert "Traceback" not in errors


def test_a_port_in_use_ends_both() -> None:
    """Process 0 is to listen where another program does already."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"--coordinator_address=127.0.0.1:{taken.getsockname()[1]}"
        flags = (*SMALL, address, "--num_processes=2", "--lost_after=5")
        pair = [start(*flags, f"--process_id={number}") for number in range(2)]
        ends = [finish(process) for process in pair]
    assert [process.returncode for process in pair] == [1, 1], ends
    for (_, errors), message in zip(ends, ("could not join", "did not meet"), strict=True):
        (line,) = errors.splitlines()
        assert message in line
        assert "address that all can reach" in line


@pytest.mark.parametrize(
    ("address", "count", "number", "message"),
    [
        ("localhost:1", None, None, "--coordinator_address needs --num_processes and --process_id"),
        ("localhost:1", 2, 2, "counts from 0"),
        *[
            (address, 2, 0, "must be HOST:PORT")
            for address in ("", "localhost", ":9000", "a:b", "a:0", "a:65536", "a b:1")
        ],
    ],
)
def test_mistakes_are_named(address: str, count: int | None, number: int | None, message: str) -> None:
    """Of such addresses JAX makes an IndexError, a run alone, or a wait for nothing."""
    with pytest.raises(ValueError, match=message):
        hosts.join(address, count, number, timeout=1)


def test_numbers_without_an_address_are_refused() -> None:
    """Each process would run alone, and write over the other's report."""
    assert "need --coordinator_address" in error_line(refused("--num_processes=2", "--process_id=0"))


def test_processes_started_differently_say_so() -> None:
    """Once both went on, each with a network of its own, to exit 0."""
    pair = start_pair(*SMALL, each=(("--seed=0",), ("--seed=1",)))
    for number, process in enumerate(pair):
        _, errors = finish(process)
        assert process.returncode == 1
        assert errors == (
            f"spdnn: error: process {number}: the processes were started differently: process 1 has --seed=1, "
            "process 0 --seed=0: start all with the same flags\n"
        )


def test_shares_make_up_the_whole(tmp_path: Path) -> None:
    """What the processes read, each its own share, must be what one process would read."""
    write_network(tmp_path, layers=1)
    lines = "".join(f"{feature}\t{1 + feature % 64}\t1\n" for feature in range(1, 40))
    (tmp_path / "sparse-images-64.tsv").write_text(lines)
    for read in (
        lambda share: inputs.random(64, 1501, share=share),
        lambda share: inputs.digits(64, 41, share=share),
        lambda share: official_files.features(tmp_path, 64, 38, share),
    ):
        whole = read(slice(None))
        for number in range(3):
            np.testing.assert_array_equal(read(slice(number, None, 3)), whole[number::3])
