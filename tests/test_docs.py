"""The pages: every block of code runs, or names commands, flags, files and targets that exist."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from spdnn_jax.command_line import app, options

pytest.importorskip("sybil")
from sybil import Example, Sybil
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "BUILD.md", *sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])]
LANGUAGES = {"python", "sh", "text", ""}
"""Of blocks: what is run, what is looked through, and what is no code."""


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other, in one namespace, as a reader would paste them."""
    for module in ("flax", "equinox", "optax"):
        if re.search(rf"^(import|from) {module}\b", page.read_text(), re.MULTILINE):
            pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a reader's settings, not ours
        for example in Sybil(parsers=[PythonCodeBlockParser()]).parse(page).examples():
            example.evaluate()


def check_shell(example: Example) -> None:
    """Looks through a block's commands: what they call is there, and takes these flags."""
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in example.parsed.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "make" in words[:1]:
            assert words[1] in targets, line
        if "spdnn" in words:
            check_command(words[words.index("spdnn") + 1 :], line)
        for word in words:
            file = word.removeprefix("--flagfile=")
            if file.startswith(("configs/", "benchmarks/")):
                assert (ROOT / file).exists(), line


def check_command(words: list[str], line: str) -> None:
    command = next((word for word in words if not word.startswith("-")), "run")
    assert command in app._COMMANDS, line
    taken = {flag.name for flag in options.taken_by(command)} | {"flagfile", "help", "version"}
    used = {word.removeprefix("--").partition("=")[0] for word in words if word.startswith("--")}
    assert used <= taken, line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_exist(page: Path) -> None:
    for example in Sybil(parsers=[CodeBlockParser("sh", check_shell)]).parse(page).examples():
        example.evaluate()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_of_a_kind_that_is_tested(page: Path) -> None:
    fences = re.findall(r"^ *```(.*)$", page.read_text(), re.MULTILINE)
    assert set(fences) <= LANGUAGES, "test blocks of this language, too"


def test_benchmarks_are_called_by_their_names() -> None:
    files = [*PAGES, ROOT / "Makefile", *ROOT.glob("benchmarks/**/*.py")]
    called = {name for file in files for name in re.findall(r"-m (benchmarks[\w.]*\w)", file.read_text())}
    absent = {name for name in called if not (ROOT / name.replace(".", "/")).with_suffix(".py").exists()}
    assert called
    assert not absent


def test_the_page_of_the_command_line_has_every_flag() -> None:
    rows = re.findall(r"^\| (`--.*?) \|", (ROOT / "docs" / "command_line.md").read_text(), re.MULTILINE)
    told = [flag for row in rows for flag in re.findall(r"`--(\w+)`", row)]
    assert sorted(told) == sorted(flag.name for flag in options.defined())


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """Links, anchors, and the references that docstrings make."""
    pytest.importorskip("mkdocstrings")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)],
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "index.html").exists()
