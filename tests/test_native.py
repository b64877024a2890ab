"""Loading the native core: what is said where it is missing, or where the installed jaxlib is too old for it."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import spdnn_jax

MISSING = (
    "the native core of spdnn_jax could not be loaded (No module named 'spdnn_jax._core'). Install the package with a "
    "C++17 compiler at hand: pip install . (see BUILD.md)"
)


def hide_core(folder: Path) -> str:
    """A source tree without a build; -S, for site-packages announce an editable install, which would find the core."""
    package = Path(spdnn_jax.__file__).parent
    shutil.copytree(package, folder / "spdnn_jax", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return "-S"


def age_jaxlib(folder: Path) -> str:
    """A jaxlib whose headers are of an older interface."""
    api = folder / "include" / "xla" / "ffi" / "api"
    api.mkdir(parents=True)
    (api / "c_api.h").write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 0\n")
    program = f"import jax\njax.ffi.include_dir = lambda: {str(folder / 'include')!r}\n"
    (folder / "sitecustomize.py").write_text(program)  # Python runs it at its start
    return "-P"


@pytest.mark.parametrize("command", ["module", "script"])
@pytest.mark.parametrize(
    ("damage", "message"), [(hide_core, MISSING), (age_jaxlib, "speaks 0.0: upgrade jaxlib, or build spdnn_jax")]
)
def test_the_command_ends_in_one_line(
    tmp_path: Path, damage: Callable[[Path], str], message: str, command: str
) -> None:
    """The package fails to import before the command line could catch anything: a person would see a traceback."""
    option = damage(tmp_path)
    script = tmp_path / "spdnn"
    script.write_text("from spdnn_jax.command_line.app import main\nmain()\n")  # as pip writes it
    done = python(tmp_path, option, *(["-m", "spdnn_jax"] if command == "module" else [str(script)]))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("spdnn: error: ")
    assert message in line


@pytest.mark.parametrize(
    ("damage", "message"), [(hide_core, MISSING), (age_jaxlib, "speaks 0.0: upgrade jaxlib, or build spdnn_jax")]
)
def test_a_program_can_catch_it(tmp_path: Path, damage: Callable[[Path], str], message: str) -> None:
    """In somebody's own program a missing core must not end the process."""
    option = damage(tmp_path)
    done = python(tmp_path, option, "-c", "try:\n  import spdnn_jax\nexcept ImportError as error:\n  print(error)")
    assert message in done.stdout, done.stderr
    assert done.returncode == 0


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with a folder first on its path."""
    search = os.pathsep.join([str(folder), *filter(None, sys.path)])
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": search}
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
