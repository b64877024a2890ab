"""The sanitizer pass: its cases, and how it reads what compute-sanitizer says."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.cuda_ext import sanitize, sanitize_cases
from spdnn_jax.graph_challenge import oracle

ROOT = Path(__file__).parents[3]

OURS = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 4 bytes
=========     at void spdnn::cuda::(anonymous namespace)::grouped_kernel<(int)16>(GroupedStep)+0x70 in grouped.cu:8
=========     by thread (31,0,0) in block (3,0,0)
=========
========= ERROR SUMMARY: 1 error
"""
OTHERS = """\
========= COMPUTE-SANITIZER
========= Uninitialized __global__ memory read of size 4 bytes
=========     at loop_broadcast_fusion+0x70
=========     by thread (31,0,0) in block (3,0,0)
=========
========= Uninitialized __global__ memory read of size 4 bytes
=========     at input_reduce_fusion+0x90
=========
========= ERROR SUMMARY: 2 errors
"""
RACE = """\
========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at spdnn::cuda::resident_kernel(int)+0x150 in resident.cu:27
=========     and Read access at spdnn::cuda::resident_kernel(int)+0x160 in resident.cu:30 [4 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
CLEAN = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"
BROKEN = CLEAN.replace("ERROR", "Internal Sanitizer Error: cannot launch\n========= ERROR")

DONE = f"grouped: 1 neuron: agrees\n{sanitize_cases.AGREED}\n"


def test_reports_are_told_apart_by_kernel() -> None:
    """XLA's own kernels may read what nobody wrote; that must neither fail our check nor hide what ours do."""
    assert sanitize.read_reports(CLEAN) == sanitize.Findings([], [])
    assert [len(found) for found in (sanitize.read_reports(OTHERS).ours, sanitize.read_reports(OTHERS).others)] == [
        0,
        2,
    ]
    assert len(sanitize.read_reports(OURS).ours) == len(sanitize.read_reports(RACE).ours) == 1
    both = sanitize.read_reports(OTHERS + OURS)
    assert (len(both.ours), len(both.others)) == (1, 2)
    assert "Internal Sanitizer Error" in sanitize.read_reports(BROKEN).ours[0]


def test_the_first_report_of_each_kernel_is_shown() -> None:
    """Thousands about one must not hide what is said of another."""
    log = OURS * 3 + RACE
    said = sanitize.judge("memcheck", sanitize.Run(86, DONE, log))
    assert said is not None
    assert said.startswith("memcheck: 4 reports")
    assert said.count("grouped_kernel") == 1 and "resident_kernel" in said


@pytest.mark.parametrize(
    ("code", "printed", "log", "message"),
    [
        (0, DONE, CLEAN, None),
        (86, DONE, OTHERS, None),
        (86, DONE, OURS, "1 reports about our kernels"),
        (86, DONE, RACE, "resident.cu:27"),
        (0, DONE, BROKEN, "Internal Sanitizer Error"),
        (None, "grouped: ...", CLEAN, "the time was up"),
        (1, "AssertionError: not equal", CLEAN, "not equal"),
        (0, "", CLEAN, "did not run to their end"),
        (86, DONE, CLEAN, "no report could be read"),
    ],
)
def test_judgement(code: int | None, printed: str, log: str, message: str | None) -> None:
    wrong = sanitize.judge("memcheck", sanitize.Run(code, printed, log))
    assert wrong is None if message is None else wrong is not None and message in wrong


def fake_sanitizer(folder: Path, body: str) -> str:
    script = folder / "compute-sanitizer"
    script.write_text(f"#!/bin/bash\nfor a; do case $a in --log-file=*) log=${{a#--log-file=}};; esac; done\n{body}\n")
    script.chmod(0o755)
    return str(script)


def run_main(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["sanitize.py", *arguments])
    return sanitize.main()


def test_every_tool_runs_the_cases(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The slow tool gets the tiny cases, and each array an allocation of its own."""
    body = f'echo "$@ $XLA_PYTHON_CLIENT_ALLOCATOR" >> {tmp_path}/calls; echo {sanitize_cases.AGREED!r}; echo > $log'
    assert run_main(monkeypatch, f"--sanitizer={fake_sanitizer(tmp_path, body)}") == 0
    assert [line.split(" (")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"{tool}: clean" for tool in sanitize.TOOLS
    ]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [f"--tool={tool}" in call for tool, call in zip(sanitize.TOOLS, calls, strict=True)] == [True] * 4
    assert ["--tiny" in call for call in calls] == [tool == "racecheck" for tool in sanitize.TOOLS]
    assert all(call.endswith(" platform") and f"-m {sanitize_cases.__name__}" in call for call in calls)


def test_a_report_or_a_hang_fails_the_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report").write_text(OURS)
    reports = fake_sanitizer(tmp_path, f"cp {tmp_path}/report $log; echo {sanitize_cases.AGREED!r}; exit 86")
    assert run_main(monkeypatch, "--tools=memcheck", f"--sanitizer={reports}") == 1
    assert "grouped_kernel" in capsys.readouterr().out
    hangs = fake_sanitizer(tmp_path, "sleep 60")
    assert run_main(monkeypatch, "--tools=memcheck", "--timeout=0.2", f"--sanitizer={hangs}") == 1
    assert "the time was up" in capsys.readouterr().out


def test_without_a_sanitizer_the_check_does_not_pass(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(monkeypatch, "--sanitizer=/no/such/tool") == 1
    assert "compute-sanitizer is not there" in capsys.readouterr().err


def test_the_cases_are_found_where_the_check_is(tmp_path: Path) -> None:
    """As `make gpu-check` runs it, but that the cases only say how they are called."""
    sanitizer = fake_sanitizer(tmp_path, 'while [[ $1 == --* ]]; do shift; done; exec "$@" --help')
    command = [sys.executable, "-m", sanitize.__name__, "--tools=memcheck", f"--sanitizer={sanitizer}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert "did not run to their end" in done.stdout, done.stdout + done.stderr
    assert "Traceback" not in done.stdout


@pytest.mark.parametrize("case", sanitize_cases.cases(), ids=lambda case: case.name)
@pytest.mark.parametrize("family", ["auto", sanitize_cases.LAYER])
def test_cases_agree_with_the_oracle(case: sanitize_cases.Case, family: str) -> None:
    assert sanitize_cases.run_case(case, family)


def test_cases_have_something_to_find() -> None:
    """A case whose outputs are all zero would agree with a kernel that does nothing."""
    for case in sanitize_cases.cases():
        network = case.network()
        expected = oracle.infer(network, sanitize_cases.plain_features(case, network.layers[0].inputs))
        assert np.count_nonzero(expected.activations) > 0, case.name


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("family", sanitize_cases.FAMILIES)
def test_every_family_runs_the_cases_in_poisoned_memory(family: str) -> None:
    ran = [sanitize_cases.run_case(case, family) for case in sanitize_cases.cases()]
    assert any(ran), f"{family} takes none of the networks"
