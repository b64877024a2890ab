"""Files as they lie: which ones a path names and in what order, unpacked where they are gzipped."""

import contextlib
import gzip
import os
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from spdnn_jax._files import unpacked

_PIECE = 1 << 20  # bytes unpacked at a time
_CONTENT_LARGEST = 1 << 28  # bytes that a packed file may hold, however small it is ...
_CONTENT_RATIO = 100  # ... and beyond that, for each of its own

FilePath = str | os.PathLike[str]
Paths = FilePath | Sequence[FilePath]
"""A file; a folder, which stands for its files in the order of the numbers in their names; or several files."""


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Names sorted with the numbers in them taken as numbers: layer2 before layer10."""
    return sorted(names, key=lambda name: [(part.isdecimal(), int(part) if part.isdecimal() else part)
                                           for part in re.split(r"(\d+)", name)])  # fmt: skip


def expand(paths: Paths) -> list[Path]:
    """The files that a path names.

    Raises:
        FileNotFoundError: A file is missing, a folder is empty, or no file was named.
    """
    if isinstance(paths, str | os.PathLike):
        folder = Path(paths)
        if not folder.is_dir():
            paths = [folder]
        else:
            names = [file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith(".")]
            paths = [folder / name for name in in_natural_order(names)]
            if not paths:
                raise FileNotFoundError(f"{folder}: the folder holds no files: name the files, or their folder")
    if not paths:
        raise FileNotFoundError("no file was named: give a file, a folder, or a list of files")
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: there is no such file: check the path")
    return [Path(path) for path in paths]


@contextlib.contextmanager
def unpacked_path(path: Path) -> Iterator[Path]:
    """A path to a file's content, for what takes no stream: the file itself, or a temporary one where it is gzipped.

    Raises:
        OSError: The file cannot be read.
        ValueError: Its gzip stream is corrupt, cut short, or a bomb.
    """
    with unpacked(path) as file:
        if not isinstance(file, gzip.GzipFile):
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="spdnn-") as plain:
            room = _largest_content(path)
            while part := file.read(min(_PIECE, room + 1 - plain.tell())):
                plain.write(part)
                if plain.tell() > room:
                    raise _bomb(path, "unpack it with gunzip")
            plain.flush()
            yield Path(plain.name)


def check_packed_size(path: Path) -> None:
    """Looks at what a zip archive announces, of which no more is unpacked.

    Raises:
        ValueError: It is a bomb.
    """
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > _largest_content(path):
            raise _bomb(path, "write it without compression")


def _largest_content(path: Path) -> int:
    """Bytes that the content of a packed file may have."""
    return max(_CONTENT_LARGEST, _CONTENT_RATIO * path.stat().st_size)


def _bomb(path: Path, cure: str) -> ValueError:
    return ValueError(
        f"{path}: unpacks to more than {_CONTENT_RATIO} times its size, as damaged and malicious files do: "
        f"where it is meant to, {cure}"
    )


@contextlib.contextmanager
def reading(name: FilePath, what: str, cure: str, *errors: type[Exception]) -> Iterator[None]:
    """Turns what a library raises for a file that is not what it claims into one line: the file, and the cure.

    Args:
        name: The file, as messages call it.
        what: What it claims to be: ``"a Matrix Market file"``.
        cure: What to do.
        errors: What the library raises beside ValueError, EOFError and MemoryError.

    Raises:
        ValueError: The library raised one of these.
    """
    try:
        yield
    except (ValueError, EOFError, MemoryError, OverflowError, *errors) as error:
        found = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(name)}: cannot be read as {what} ({found}): {cure}") from None


def load_text(file: IO[Any], **options: Any) -> np.ndarray:
    """`numpy.loadtxt` without its warning of a file that holds no numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return np.loadtxt(file, **options)
