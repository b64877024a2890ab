"""The records of a benchmark, written after every measurement: a time limit must not lose what is done."""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from spdnn_jax import _native
from spdnn_jax.command_line import report

_KEY = ("section", "name", "contender")


class Results:
    """Measurements of one device with one set of versions, kept in a JSON file.

    A file that the same device and versions wrote is continued, so that a long benchmark can be run in parts; a record
    of the same section, name and contender is replaced. Another file is begun anew.
    """

    def __init__(self, path: str | os.PathLike[str], settings: dict[str, Any]) -> None:
        """Opens the file, and begins a run, which keeps the command and the machine's load before it.

        Args:
            path: The file; its folder must exist.
            settings: What else a figure depends on.

        Raises:
            OSError: The file cannot be read or written.
        """
        self._path = Path(path)
        head = {"device": report.device(), "driver": _driver(), "versions": report.versions()}
        self.content: dict[str, Any] = {**head, "runs": [], "records": []}
        if self._path.exists():
            old = json.loads(self._path.read_text(encoding="utf-8"))
            if old.items() >= head.items():
                self.content = old
        run = {"command": command(), "settings": settings, "load_before": os.getloadavg()[0]}
        self.content["runs"].append(run | {"library": _library_digest()})
        self._write()

    def add(self, record: dict[str, Any]) -> None:
        """Keeps a record: `section`, `name`, `contender`, and what was measured, or an `error`.

        The record's `run` tells which entry of `runs` made it.
        """
        record = {**record, "run": len(self.content["runs"]) - 1}
        key = [record[name] for name in _KEY]
        records = self.content["records"]
        self.content["records"] = [old for old in records if [old[name] for name in _KEY] != key] + [record]
        self._write()

    def _write(self) -> None:
        report.write_json(self._path, self.content)


def command() -> str:
    """The command that this process is, to be run again from the root of the repository."""
    return shlex.join(["python", *sys.orig_argv[1:]])


def _library_digest() -> str | None:
    """Names the CUDA library that was measured, for a file may hold records of several."""
    if not _native.has_cuda_library():
        return None
    return hashlib.sha256(_native.CUDA_LIBRARY.read_bytes()).hexdigest()[:12]


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.memory", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None
