"""Imports run downward only: the engine knows nothing of the folders below it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import spdnn_jax

PACKAGE = Path(spdnn_jax.__file__).parent
BELOW = {  # what each room may import of the others
    "engine": set(),
    "io": {"engine"},
    "nn": {"engine"},
    "distributed": {"engine"},
    "graph_challenge": {"engine", "io"},
    "command_line": {"engine", "io", "nn", "distributed", "graph_challenge"},
}


def room_of(module: str) -> str:
    """The room of a dotted module name below spdnn_jax."""
    first = module.split(".")[0]
    return first if first in BELOW else "engine"


def imported(path: Path) -> Iterator[str]:
    """Modules below spdnn_jax that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("spdnn_jax.") for name in names if name.startswith("spdnn_jax."))


@pytest.mark.parametrize("room", BELOW)
def test_imports_run_downward(room: str) -> None:
    files = PACKAGE.glob("*.py") if room == "engine" else PACKAGE.joinpath(room).rglob("*.py")
    for path in files:
        if room == "engine" and path.name in ("__init__.py", "__main__.py"):
            continue  # the front door: what a user calls
        for module in imported(path):
            assert room_of(module) in {room} | BELOW[room], f"{path.name} imports {module}"
