"""Files: written whole or not at all, never in the way of what is no regular file; read plain or through gzip."""

import contextlib
import errno
import gzip
import os
import secrets
import shutil
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from spdnn_jax._interrupts import on_interrupt

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DESCRIPTORS = ("/dev/fd/", "/dev/std", "/proc/")
"""Where a path stands for an open file, perhaps a regular one, that is not ours to replace."""
_GZIP = b"\x1f\x8b"
_PRIVATE = ".spdnn-"
_NAMELESS: int | None = getattr(os, "O_TMPFILE", None)  # Linux knows files without a name


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file that takes the place of `path` at the end of the block, in one step; else nothing changes.

    Of a file that is there mode and owner stay, of a symbolic link the link. A device, a FIFO or an open descriptor
    (``/dev/stdout``) is written through, once all is there. An unfinished file has no name where the file system can
    do that, so that not even SIGKILL leaves one behind; elsewhere it has one of its own (``.spdnn-*.part``).

    Args:
        path: The file to write.

    Yields:
        A binary file, writable and seekable. When the block ends its content is on the disk.

    Raises:
        OSError: The file cannot be written; the error names it.
    """
    given = Path(path)
    with _named(given):
        before = _status(given)
        if _is_no_file(given, before):
            with tempfile.TemporaryFile() as whole:
                yield whole
                whole.seek(0)
                with given.open("wb", buffering=0) as out:
                    shutil.copyfileobj(whole, out)
            return
        target = Path(os.path.realpath(given))
        if before is not None:
            target.open("ab").close()  # what may not be written is not replaced either
        with _unfinished(target.parent) as (file, publish):
            yield file
            file.flush()
            if before is not None:
                _keep_mode_and_owner(file.fileno(), before)
            os.fsync(file.fileno())
            publish(target)


@contextlib.contextmanager
def unpacked(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Opens a file to be read, through gzip where its first bytes say so, whatever its name.

    Args:
        path: The file.

    Yields:
        A binary file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The gzip stream is corrupt or cut short, which may show in the middle of the block.
    """
    try:
        with Path(path).open("rb") as file:
            if file.peek(len(_GZIP)).startswith(_GZIP):
                with gzip.open(file) as stream:
                    yield stream  # pyright: ignore[reportReturnType]
            else:
                yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{os.fspath(path)}: the gzip stream is corrupt or cut short ({error}): fetch the file again"
        ) from None


def check_writable(path: str | os.PathLike[str]) -> None:
    """Finds out before a long run, not after it, whether `replacing` could write a file; changes nothing.

    Raises:
        OSError: It could not; the error names the file and says what to do.
    """
    given = Path(path)
    before = _status(given)
    if before is not None and stat.S_ISDIR(before.st_mode):
        raise IsADirectoryError(f"{given} cannot be written: it is a folder; name a file in it")
    if _is_no_file(given, before):
        return  # to open a FIFO would wait for its reader
    target = Path(os.path.realpath(given))
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{given} cannot be written: the folder {target.parent} does not exist; make it first")
    try:
        if before is not None:
            target.open("ab").close()
        with _unfinished(target.parent):  # os.access says yes to root, even where nothing can be written
            pass
    except OSError as error:
        raise PermissionError(
            f"{given} cannot be written ({error.strerror}): choose another place, or change the permissions"
        ) from None


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except FileNotFoundError:
        return None


def _is_no_file(path: Path, status: os.stat_result | None) -> bool:
    if status is None or stat.S_ISDIR(status.st_mode):
        return False
    return not stat.S_ISREG(status.st_mode) or str(path).startswith(_DESCRIPTORS)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Tells which file it was that could not be written: for a full disk the operating system does not."""
    try:
        yield
    except OSError as error:
        is_ours = error.errno in _FULL if error.filename is None else _PRIVATE in str(error.filename)
        if not is_ours:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[tuple[BinaryIO, Callable[[Path], None]]]:
    """A new file in a folder, and what gives it its final name; the file is gone where that is not called."""
    name = folder / f"{_PRIVATE}{secrets.token_hex(8)}.part"
    descriptor = -1
    if _NAMELESS is not None:
        with contextlib.suppress(OSError):  # not every file system can
            descriptor = os.open(folder, _NAMELESS | os.O_RDWR | os.O_CLOEXEC, 0o666)
    is_named = descriptor < 0
    if is_named:
        descriptor = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o666)

    def publish(target: Path) -> None:
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if not is_named:  # with a folder's descriptor Python calls linkat(2), which follows the link in /proc
                os.link(f"/proc/self/fd/{descriptor}", name.name, dst_dir_fd=at, follow_symlinks=True)
            name.replace(target)
            with contextlib.suppress(OSError):  # not every file system can
                os.fsync(at)
        finally:
            os.close(at)

    try:
        with on_interrupt(lambda: name.unlink(missing_ok=True)), open(descriptor, "w+b") as file:  # noqa: PTH123
            yield file, publish
    finally:
        name.unlink(missing_ok=True)


def _keep_mode_and_owner(descriptor: int, before: os.stat_result) -> None:
    with contextlib.suppress(PermissionError):  # only root gives files away
        os.fchown(descriptor, before.st_uid, before.st_gid)
    os.fchmod(descriptor, stat.S_IMODE(before.st_mode))
