"""compute-sanitizer over every kernel family: memcheck, racecheck, initcheck, synccheck on small odd networks.

    python -m benchmarks.cuda_ext.sanitize [--tools=memcheck,racecheck,initcheck,synccheck] [--sanitizer=PATH]

Runs `sanitize_cases.py` under each tool. The exit code is 0 where every case agreed with the oracle and no tool
reported an error in a kernel of ours; reports about kernels of XLA's are counted, and fail nothing.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cuda_ext import sanitize_cases

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")

_TINY = ("racecheck",)  # tools that are slow: the smallest cases have to do
_OURS = "spdnn"  # the namespace of every kernel of ours, demangled or not
_REPORTED = 86  # compute-sanitizer's exit code where it reported something
_LIMIT = 1000  # reports that are written
_PLACES = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer", "/opt/cuda/bin/compute-sanitizer")
_PLACE = re.compile(r"\bat ")  # what every report about a kernel says
_KERNEL = re.compile(r"\w+_kernel\b")
_NO_REPORT = re.compile("^COMPUTE-SANITIZER$|SUMMARY:")  # the first and the last lines of a log
_COMMON_OPTIONS = (f"--print-limit={_LIMIT}", "--show-backtrace=no", "--target-processes=application-only")
_OPTIONS = {"memcheck": ["--report-api-errors=no"]}  # JAX asks the driver for what it may not have
_ENVIRONMENT = {  # one device allocation for each array: the sanitizer then sees its true bounds
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
    "JAX_PLATFORMS": "cuda,cpu",
    "XLA_FLAGS": "--xla_gpu_autotune_level=0",  # tuning compares products in memory that nobody has written
}


@dataclass(frozen=True)
class Findings:
    """What a tool reported, each as the text of one report.

    Attributes:
        ours: Reports about our kernels, or that name no kernel at all.
        others: Reports about kernels of others.
    """

    ours: list[str]
    others: list[str]


def read_reports(log: str) -> Findings:
    """Tells the reports in a sanitizer's log apart.

    Args:
        log: What compute-sanitizer wrote with --log-file.
    """
    ours: list[str] = []
    others: list[str] = []
    lines = (line.lstrip("=").strip() for line in log.splitlines())
    text = "\n".join(line for line in lines if not _NO_REPORT.search(line))
    for block in filter(None, (part.strip() for part in text.split("\n\n"))):
        foreign = _PLACE.search(block) is not None and _OURS not in block
        (others if foreign else ours).append(block)
    return Findings(ours, others)


def find_sanitizer(given: str | None) -> str | None:
    """The path of compute-sanitizer, or None where there is none."""
    home = os.environ.get("CUDA_HOME")
    places = [given] if given else [*([f"{home}/bin/compute-sanitizer"] if home else []), *_PLACES]
    return next((found for place in places if (found := shutil.which(place))), None)


@dataclass(frozen=True)
class Run:
    """How a run under a tool ended.

    Attributes:
        code: Exit code; None where the time was up.
        printed: What the cases printed.
        log: What the sanitizer wrote.
    """

    code: int | None
    printed: str
    log: str


def run_tool(sanitizer: str, tool: str, timeout: float) -> Run:
    """Runs the cases under one tool, for `timeout` seconds at most."""
    cases = [sys.executable, "-m", sanitize_cases.__name__, *(["--tiny"] if tool in _TINY else [])]
    with tempfile.TemporaryDirectory() as folder:
        log, printed = Path(folder) / "log", Path(folder) / "printed"
        options = [*_COMMON_OPTIONS, f"--log-file={log}", *_OPTIONS.get(tool, [])]
        command = [sanitizer, f"--tool={tool}", f"--error-exitcode={_REPORTED}", *options, *cases]
        with printed.open("w") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=output, env=os.environ | _ENVIRONMENT, start_new_session=True
            )
            try:
                code = process.wait(timeout)
            except subprocess.TimeoutExpired:
                code = None
                os.killpg(process.pid, signal.SIGKILL)  # the cases, too, which would hold the GPU
                process.wait()
        return Run(code, *(path.read_text(errors="replace") if path.exists() else "" for path in (printed, log)))


def judge(tool: str, run: Run) -> str | None:
    """What is wrong after a tool's run, with what is to be seen of it, or None."""
    seen = f"the last lines:\n{_tail(run.printed)}\n{_tail(run.log)}"
    found = read_reports(run.log)
    if found.ours:
        firsts = "\n".join(_first_of_each_kernel(found.ours))
        return f"{tool}: {len(found.ours)} reports about our kernels, the first of each:\n{firsts}"
    if run.code is None:
        return f"{tool}: the time was up (--timeout) before the cases were done; {seen}"
    if sanitize_cases.AGREED not in run.printed:
        return f"{tool}: the cases did not run to their end (exit code {run.code}); {seen}"
    if len(found.others) >= _LIMIT:
        return f"{tool}: so many reports about other kernels that ours may be hidden, the first:\n{found.others[0]}"
    if run.code not in (0, _REPORTED) or (run.code == _REPORTED and not found.others):
        return f"{tool}: exit code {run.code}, but no report could be read; {seen}"
    return None


def _first_of_each_kernel(reports: list[str]) -> list[str]:
    firsts: dict[str, str] = {}
    for report in reports:
        named = _KERNEL.search(report)
        firsts.setdefault(named.group() if named else "", report)
    return list(firsts.values())


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-15:])


def main() -> int:
    """Runs the tools one after the other; says how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", default=",".join(TOOLS), help="which, separated by commas")
    parser.add_argument("--sanitizer", help="path of compute-sanitizer, where it is not found")
    parser.add_argument("--timeout", type=float, default=200, help="seconds for each tool")
    arguments = parser.parse_args()
    tools = arguments.tools.split(",")
    if unknown := set(tools) - set(TOOLS):
        parser.error(f"unknown tools {', '.join(sorted(unknown))}: choose from {', '.join(TOOLS)}")
    sanitizer = find_sanitizer(arguments.sanitizer)
    if sanitizer is None:
        print("compute-sanitizer is not there: install the CUDA toolkit's, or say --sanitizer=PATH", file=sys.stderr)
        return 1
    failed = False
    for tool in tools:
        start = time.perf_counter()
        run = run_tool(sanitizer, tool, arguments.timeout)
        wrong = judge(tool, run)
        failed = failed or wrong is not None
        others = len(read_reports(run.log).others)
        beside = f"; {others} reports about kernels of others" if others else ""
        print(f"{wrong or f'{tool}: clean{beside}'} ({time.perf_counter() - start:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
