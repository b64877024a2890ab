"""Standard output and error, which may be full, closed, or a pipe that nobody reads any more."""

import contextlib
import io
import os
import sys
from typing import Any

from spdnn_jax import _interrupts


class _Lossy(io.FileIO):
    """A file that loses what cannot be written."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data) or len(data)
        except OSError:
            return len(data)


class _Named(io.FileIO):
    """Standard output: its first error says which file it was, and is the last."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())  # else Python tries once more at the end, and complains
            os.close(null)
            raise OSError(error.errno, error.strerror, "standard output") from None


def take_over() -> None:
    """Names errors of standard output; and what is said on the way, on standard error, ends a run no more."""
    for name, descriptor, kind in (("stdout", 1, _Named), ("stderr", 2, _Lossy)):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or a test's
            stream = getattr(sys, name)
            if stream.fileno() == descriptor:
                lines = name == "stderr" or stream.line_buffering or stream.write_through
                setattr(sys, name, _text(kind(descriptor, "w", closefd=False), stream.encoding, lines))


def silence_native_code() -> None:
    """Leaves standard error to Python: native code's log gets lost, unless SPDNN_NATIVE_LOG=1.

    Where another process is lost, JAX logs pages for its programmers.
    """
    if os.environ.get("SPDNN_NATIVE_LOG") == "1":
        return
    _interrupts.errors = os.dup(2)
    sys.stderr = _text(_Lossy(_interrupts.errors, "w"), sys.stderr.encoding, True)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def _text(file: io.FileIO, encoding: str, lines: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BufferedWriter(file), encoding, "backslashreplace", line_buffering=lines)
