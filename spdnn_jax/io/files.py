"""Files as they lie: which ones a path names and in what order, unpacked where they are gzipped."""

import contextlib
import gzip
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from spdnn_jax._files import unpacked

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
        ValueError: Its gzip stream is corrupt or cut short.
    """
    with unpacked(path) as file:
        if not isinstance(file, gzip.GzipFile):
            yield path
            return
        with tempfile.NamedTemporaryFile(prefix="spdnn-") as plain:
            shutil.copyfileobj(file, plain)
            plain.flush()
            yield Path(plain.name)


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
