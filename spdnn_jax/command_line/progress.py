"""How far a step is, on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from spdnn_jax._extras import require

_FIRST_SHARE, _FIRST_SECONDS = 0.05, 2.0  # after which a time is told: the very first steps may be the longest
_LAST_SECONDS = 60.0  # when it is told at the latest ...
_LONG_SECONDS = 10.0  # ... if all will take longer than this


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields a function that takes the number of steps done.

    Without tqdm, or where standard error is no terminal, a line says what is under way instead, and one more, as soon
    as that can be told, how long it will take, if that is long.
    """
    try:
        tqdm: Any = require("tqdm", extra="data", purpose="progress bars").tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield _estimate(title, total)
        return
    with tqdm(desc=title, total=total, file=sys.stderr, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        show.bar = bar  # pyright: ignore[reportFunctionMemberAccess]
        yield show


def _estimate(title: str, total: int) -> Callable[[int], None]:
    """Says once how long all steps will take, if those to come are as long as the last."""
    started = before = time.perf_counter()
    counted, said = 0, False

    def show(done: int) -> None:
        nonlocal before, counted, said
        if said or done <= counted:
            return
        now = time.perf_counter()
        seconds = now - started + (total - done) * (now - before) / (done - counted)
        before, counted = now, done
        if now - started < (_FIRST_SECONDS if done >= total * _FIRST_SHARE else _LAST_SECONDS):
            return
        said = True
        if seconds > _LONG_SECONDS:
            print(f"{title}: about {rounded(seconds)} in all", file=sys.stderr, flush=True)

    return show


def rounded(seconds: float) -> str:
    """A time that is not known any better."""
    for unit, scale in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:.0f} {unit}"
    return f"{seconds:.0f} seconds"


@contextlib.contextmanager
def byte_bar(title: str) -> Iterator[Callable[[str, int, int | None], None]]:
    """A progress bar for a download; yields a function that takes a name, the bytes there, and the bytes in all."""
    with progress_bar(title, 0) as show:

        def show_bytes(_: str, done: int, total: int | None) -> None:
            bar = getattr(show, "bar", None)
            if bar is not None:
                bar.total, bar.unit, bar.unit_scale = total, "B", True
            show(done)

        yield show_bytes
