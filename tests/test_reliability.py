"""docs/reliability.md: every test that it names exists."""

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reliability.md"
_QUOTED = re.compile(r"`([^`]*test_[^`]*)`")
_TEST = re.compile(r"([\w/]+\.py)?(?:::)?(test_\w+)?")


def rows() -> Iterator[tuple[str, str]]:
    """The promises of the page, and what holds each."""
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 4 and cells[1] not in ("promise", "---"):
            yield cells[1], cells[2]


def named(holds: str) -> Iterator[tuple[str, str]]:
    """Files and tests in a cell; a test without a file stands in the file before it, and a file alone for all of it."""
    file = ""
    for quoted in _QUOTED.findall(holds):
        found = _TEST.fullmatch(quoted)
        assert found, f"{quoted} names no test"
        file = found[1] or file
        yield file, found[2] or ""


def test_every_promise_names_tests_that_exist() -> None:
    promises = list(rows())
    assert len(promises) > 30
    for promise, holds in promises:
        tests = list(named(holds))
        assert tests, f"nothing holds: {promise}"
        for file, test in tests:
            paths = [ROOT / file] if "/" in file else [*(ROOT / "tests").rglob(file)]
            assert len(paths) == 1, f"{file} is one of {len(paths)} files: name its folder"
            content = paths[0].read_text(encoding="utf-8")
            assert f"def {test}(" in content if test else "def test_" in content, f"{file} has no {test}"
