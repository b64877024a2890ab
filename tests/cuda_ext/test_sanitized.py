"""The native core (CPU back end, builder, simplifier, reader of tables), under the sanitizers of GCC and Clang.

Address and undefined behaviour here; `make tsan` runs the same program under ThreadSanitizer (SPDNN_SANITIZER=thread).
"""

import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import FUZZ
from tests.emulator import emulate

pytestmark = pytest.mark.skipif(emulate.missing() is not None, reason=str(emulate.missing()))

SANITIZER = os.environ.get("SPDNN_SANITIZER", "address,undefined")
ROUNDS = 500 if FUZZ else 20

_SOURCE = Path(__file__).parents[2] / "cuda_ext"
_OPTIONS = ["-std=c++17", "-O0", "-g1", f"-fsanitize={SANITIZER}", "-fno-sanitize-recover", f"-I{_SOURCE}", "-pthread"]


def build(folder: Path) -> Path:
    """Compiles all but the module and the handlers, which need Python and XLA."""
    sources = [Path(__file__).parents[1] / "sanitized" / "main.cc"]
    sources += [path for room in ("layout", "io", "cpu") for path in (_SOURCE / room).glob("*.cc")]
    cache = os.environ.get("CMAKE_CXX_COMPILER_LAUNCHER")

    def compiled(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        command = [
            *([cache] if cache else []),
            "g++",
            *_OPTIONS,
            "-DSPDNN_KERNELS=baseline",
            "-c",
            source,
            "-o",
            target,
        ]
        run(*command)
        return target

    with ThreadPoolExecutor() as pool:
        objects = list(pool.map(compiled, [source for source in sources if source.name != "handlers.cc"]))
    run("g++", *_OPTIONS, *objects, "-o", folder / "main")
    return folder / "main"


def run(*command: object) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]


def test_the_native_core_under_sanitizers(tmp_path: Path) -> None:
    """Random networks, whole and damaged: no read or write outside a buffer, nothing undefined, nothing wrong."""
    run(build(tmp_path), 1, ROUNDS)
