"""What a wheel holds, for tests run on an editable install, which finds what a wheel may lack; and the lock of CI."""

import os
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from spdnn_jax import _native

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a wheel brings it, with the libraries that were built and installed already."""
    pytest.importorskip("scikit_build_core")
    target = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-build-isolation"]
    done = subprocess.run(
        [*build, "--no-deps", "--config-settings=wheel.cmake=false", "--wheel-dir", str(target), str(ROOT)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    folder = target / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    for library in Path(str(_native.core.__file__)).parent.glob("*.so"):
        shutil.copy(library, folder / "spdnn_jax")
    return folder


def test_a_wheel_runs_without_the_source_tree(unpacked: Path, tmp_path: Path) -> None:
    """-S keeps site-packages from announcing the editable install; the folder of the program is an empty one."""
    path = [str(unpacked), *(entry for entry in sys.path if entry and Path(entry).resolve() != ROOT)]
    flags = ["--neurons=64", "--layers=3", "--features=20", "--repeats=1", "--inputs=random", "--backend=cpu"]
    done = subprocess.run(
        [sys.executable, "-S", "-m", "spdnn_jax", *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path), "JAX_PLATFORMS": "cpu"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal the float64 oracle's" in done.stdout


def test_a_wheel_holds_the_package_and_nothing_else(unpacked: Path) -> None:
    assert {path.name.partition("-")[0] for path in unpacked.iterdir()} == {"spdnn_jax"}

    def modules(folder: Path) -> set[str]:
        return {str(path.relative_to(folder)) for path in folder.rglob("*.py*") if "__pycache__" not in path.parts}

    assert modules(unpacked / "spdnn_jax") == modules(ROOT / "spdnn_jax")


def test_the_lock_holds_what_is_installed() -> None:
    """`make LOCKED=1 test` would install anything beside it without a hash."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = runpy.run_path(str(ROOT / ".ci" / "lock"))["wanted"](project)
    lines = (ROOT / ".ci" / "requirements.txt").read_text().splitlines()[1:]
    assert all(re.fullmatch(r"\S+==\S+ --hash=sha256:[0-9a-f]{64}", line) for line in lines)
    locked = dict(line.split(" ")[0].split("==") for line in lines)
    versions = {canonicalize_name(name): version for name, version in locked.items()}
    for text in wanted:
        requirement = Requirement(text)
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)]), requirement
