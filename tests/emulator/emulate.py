"""Runs the CUDA kernels on the CPU: the very sources, compiled by g++ against a stand-in for CUDA's header.

What it shows: wrong results, reads of memory that nobody wrote or that lies outside a buffer, misaligned loads, missing
waits and barriers (threads run in random order between barriers), barriers that not all threads reach. What it does not
show: speed, the memory model, what the compiler for the GPU makes of the code. `make gpu-check` does.
"""

import fcntl
import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spdnn_jax import Plan, planner

_HERE = Path(__file__).parent
_SOURCE = Path(__file__).parents[2] / "cuda_ext"
_INPUT_TYPES = {"float32": 0, "uint8": 1, "bool": 1, "uint32": 2}  # as cuda_ext/cuda/input.h counts them
_OPTIONS = ["-std=c++17", "-Og", "-g1", "-Wno-unknown-pragmas", "-fsanitize=address,undefined", "-fno-sanitize-recover"]
# What the address sanitizer sees anyway, and inlining of what is called once, double the time to compile.
_OPTIONS += ["-fno-sanitize=null,pointer-overflow", "-fno-inline-functions-called-once"]

_LAUNCH = re.compile(r"(\w+)<<<(.*?)>>>\((.*?)\);", re.DOTALL)
_DYNAMIC_SHARED = re.compile(r"extern __shared__ __align__\(\d+\) (\w+) (\w+)\[\];")


@functools.cache
def missing() -> str | None:
    """Why the kernels cannot be emulated here, or None."""
    if not shutil.which("g++"):
        return "g++ is not found"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "empty.cc"
        source.write_text("int main() {}")
        tried = _run("g++", *_OPTIONS, source, "-o", source.with_suffix(""))
    return None if tried.returncode == 0 else "g++ has no address sanitizer"


@dataclass(frozen=True)
class Result:
    """What a network call gives.

    Attributes:
        activations: float32 (features, outputs), or of size 0 where not asked for.
        alive: bool (features,).
        active: int32 (layers,).
    """

    activations: np.ndarray
    alive: np.ndarray
    active: np.ndarray


def build(folder: Path, definition: str = "", main: str = "main.cc") -> Path:
    """Compiles the kernels, once: others who ask for the same folder meanwhile, in other processes, wait.

    Args:
        folder: Where to; of programs with other definitions or main files, only what differs is compiled again.
        definition: A macro, as in "NAME=1".
        main: The file of the program itself.

    Returns:
        The program.
    """
    folder.mkdir(exist_ok=True)
    program = folder / f"{main}{definition}.run"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _compile(folder, definition, main, program)
    return program


def _compile(folder: Path, definition: str, main: str, program: Path) -> None:
    sources = []
    for path in sorted((_SOURCE / "cuda").iterdir()):
        if path.suffix in (".cu", ".cuh", ".h") and path.name != "intrinsics.cuh":
            copy = folder / (path.name + ".cc" if path.suffix == ".cu" else path.name)
            copy.write_text(_as_cpp(path.read_text()))
            sources += [copy] if path.suffix == ".cu" else []
    shutil.copy(_HERE / "intrinsics.cuh", folder)
    sources += [_HERE / "emulator.cc", _HERE / main]
    options = [*_OPTIONS, f"-I{_HERE}", f"-I{folder}", f"-I{_SOURCE}"]

    def compiled(source: Path) -> Path:
        """The object of a source, a new one where the definition concerns it."""
        own = definition if definition and definition.partition("=")[0] in source.read_text() else ""
        target = folder / f"{source.name}{own}.o"
        if not target.exists():
            done = _run("g++", *options, *([f"-D{own}"] if own else []), "-c", source, "-o", target)
            assert done.returncode == 0, done.stderr
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, sources))
    linked = _run("g++", *options, *objects, "-o", program)
    assert linked.returncode == 0, linked.stderr


class Emulator:
    """The compiled kernels."""

    def __init__(self, program: Path, folder: Path) -> None:
        """Takes them.

        Args:
            program: As `build` returns it.
            folder: An empty folder to work in.
        """
        self._program = program
        self._folder = folder

    def run(
        self,
        plan: Plan,
        y0: np.ndarray,
        *,
        steps: Sequence[planner.Step] | None = None,
        activations: bool = True,
        seed: int = 1,
    ) -> Result:
        """Runs a network.

        Args:
            plan: The network.
            y0: Features, as for `infer`.
            steps: What to do with the layers; by default, what the planner says.
            activations: Whether they are wanted.
            seed: Of the order of threads between barriers.
        """
        call = np.asarray([len(y0), _INPUT_TYPES[str(y0.dtype)], activations], np.int64)
        narrow = y0.dtype != np.float32
        schedule = (
            planner.schedule(plan.table, plan.kernel, narrow_input=narrow, features=len(y0))
            if steps is None
            else planner.Schedule(tuple(steps), "")
        )
        files = {
            "records": plan.table.records,
            "words": plan.words,
            "schedule": schedule.records,
            "call": call,
            "input": y0,
        }
        for name, array in files.items():
            np.ascontiguousarray(array).tofile(self._folder / name)
        done = _run(self._program, self._folder, seed)
        assert done.returncode == 0, done.stderr[-4000:]
        y, alive, active = (
            np.fromfile(self._folder / name, dtype)
            for name, dtype in (("activations", np.float32), ("alive", np.bool_), ("active", np.int32))
        )
        return Result(y.reshape(-1, max(plan.outputs, 1)), alive, active)


class RowsEmulator:
    """The compiled kernels for weights in compressed rows."""

    def __init__(self, program: Path, folder: Path) -> None:
        """Takes them, as `build` returns them, and an empty folder to work in."""
        self._program = program
        self._folder = folder

    def run(self, what: str, sizes: Sequence[int], out: np.ndarray, **arrays: np.ndarray) -> np.ndarray:
        """Runs one call.

        Args:
            what: "product", "sampled", either after "sliced ", "chain", "derivative" or "transposed".
            sizes: Numbers that the program reads, by what it runs.
            out: Of the shape and dtype of the result.
            arrays: What it reads, by name.
        """
        np.asarray(sizes, np.int64).tofile(self._folder / "sizes")
        for name, array in arrays.items():
            np.ascontiguousarray(array).tofile(self._folder / name)
        done = _run(self._program, self._folder, what)
        assert done.returncode == 0, done.stderr[-4000:]
        return np.fromfile(self._folder / "out", out.dtype).reshape(out.shape)

    def masks(self, features: int) -> np.ndarray:
        """Those of the last "chain" or product, uint32 (features, words)."""
        return np.fromfile(self._folder / "masks", np.uint32).reshape(features, -1)


def _as_cpp(source: str) -> str:
    source = _DYNAMIC_SHARED.sub(r"\1* \2 = static_cast<\1*>(emulator::dynamic_shared());", source)
    return _LAUNCH.sub(r"emulator::launch(\2, [=] { \1(\3); });", source)


def _run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=900)
