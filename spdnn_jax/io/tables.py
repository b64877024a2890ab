"""Tables of two whole numbers and one number a line, tabs between: read in batches by native code, over all cores."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax._files import unpacked
from spdnn_jax._native import core, usable_cores

Table = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows of a file by column: int32, int32, float32."""

_BLOCK = 1 << 24  # bytes of text held at a time
_NEWLINE = ord("\n")
_SHOWN = 60  # bytes of a malformed line that are shown
_MARK = b"\xef\xbb\xbf"  # a byte-order mark
_PIECE = 1 << 20  # bytes read at a time where none are kept


@dataclass(frozen=True)
class Source:
    """What a table is read from.

    Attributes:
        name: What to call it in messages.
        open: Opens it, to be read with ``readinto``.
        size: Its bytes, where they are known.
    """

    name: str
    open: Callable[[], contextlib.AbstractContextManager[Any]]
    size: int | None = None

    @classmethod
    def of(cls, path: Path) -> "Source":
        """A file, gzipped or not, as its first bytes say."""
        return cls(str(path), lambda: unpacked(path))


def read_tables(source: Source, cure: str, threads: int | None = None) -> Iterator[Table]:
    """Batches of rows, so that memory stays bounded.

    A byte-order mark and blank lines at the end are no rows, and no harm.

    Args:
        source: What to read.
        cure: What to do about a file that is cut short or corrupt: the end of messages.
        threads: Threads to read with; by default, the cores this process may use.

    Returns:
        An iterator of batches.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is malformed or empty; the message names the line.
    """
    threads = threads or usable_cores()
    name, lines = source.name, 0
    text = np.empty(_BLOCK if source.size is None else min(source.size + 1, _BLOCK), np.uint8)
    held = 0  # bytes at the head of `text`: a line whose end is still to be read
    with source.open() as file:
        is_first = True
        while count := file.readinto(text[held:]):
            filled, begin = held + count, 0
            if is_first and text[: len(_MARK)].tobytes() == _MARK:
                begin = len(_MARK)
            is_first = False
            first, second, third, used = core.parse_table(text[begin:filled], threads)
            used += begin
            lines += first.size
            held = filled - used
            if held == text.size or (text[used:filled] == _NEWLINE).any():
                if not _is_blank(text[used:filled]) or not all(map(_is_blank, iter(lambda: file.read(_PIECE), b""))):
                    raise _malformed(name, lines + 1, text[used:filled], cure)
                held = 0
            if first.size:
                yield first, second, third
            text[:held] = text[used:filled][:held]
    if held and not _is_blank(text[:held]):
        text[held] = _NEWLINE
        if core.parse_table(text[: held + 1], 1)[0].size == 0:
            raise _malformed(name, lines + 1, text[:held], cure)
        raise ValueError(f"{name}, line {lines + 1}: the line has no end: the file is cut short; {cure}")
    if not lines:
        raise ValueError(f"{name}: the file is empty: {cure}")


def _is_blank(text: np.ndarray | bytes) -> bool:
    return not bytes(text).strip(b" \t\r\n")


def _malformed(name: str, line: int, text: np.ndarray, cure: str) -> ValueError:
    found = text[:_SHOWN].tobytes().split(b"\n")[0]
    advice = "" if found.isascii() and b"\0" not in found else f": the file is corrupt; {cure}"
    return ValueError(
        f"{name}, line {line}: expected two whole numbers and a number with tabs between, "
        f"found {found.decode(errors='backslashreplace')!r}{advice}"
    )
