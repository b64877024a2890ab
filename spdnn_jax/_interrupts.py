"""Ctrl-C and SIGTERM in the program `spdnn`: it ends at once, in one line, wherever it is.

Python runs a signal's handler between two steps of the main thread, which may be minutes away while native code runs,
and raises KeyboardInterrupt in places that cannot take it: in the middle of an import, or of a callback of XLA's, which
swallows it. So a thread of its own waits for the signal here. No module but the standard library's is needed for that,
for it has to be in place before the slow imports are.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

_ENDS = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated")}
"""Exit codes, as a shell reports them, and what is said."""

errors = 2
"""The descriptor on which people read."""

_actions: list[Callable[[], object]] = []
_is_watching = False


def watch() -> None:
    """Ends the program where Ctrl-C or SIGTERM come; to be called again after a library has taken these signals.

    A signal that whoever started the program wants ignored is left so.
    """
    global _is_watching
    if not _is_watching:
        _fill_standard_descriptors()
        source, target = os.pipe()
        os.set_blocking(target, False)
        signal.set_wakeup_fd(target, warn_on_full_buffer=False)  # written to at once, whatever the main thread does
        threading.Thread(target=_wait, args=(source,), name="spdnn-interrupts", daemon=True).start()
        _is_watching = True
    for number in _ENDS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _nothing)


@contextlib.contextmanager
def on_interrupt(action: Callable[[], object]) -> Iterator[None]:
    """Has `action` called where the program is interrupted inside the block; in a thread of its own."""
    _actions.append(action)
    try:
        yield
    finally:
        _actions.remove(action)


def _fill_standard_descriptors() -> None:
    """Where standard input, output or error are closed, the next file would take their numbers, and what is printed."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115


def _nothing(number: int, frame: FrameType | None) -> None:
    """What is to be done is done in `_wait`."""


def _wait(source: int) -> None:
    while (number := os.read(source, 1)[0]) not in _ENDS:
        pass
    for action in reversed(_actions):
        with contextlib.suppress(Exception):
            action()
    code, word = _ENDS[signal.Signals(number)]
    with contextlib.suppress(OSError):
        os.write(errors, f"{chr(10) if os.isatty(errors) else ''}spdnn: {word}\n".encode())
    os._exit(code)
