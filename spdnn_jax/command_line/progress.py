"""How far a step is, on standard error."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from spdnn_jax._extras import require

_FIRST_SECONDS = 2.0  # after which it is told how long a step takes ...
_LONG_SECONDS = 10.0  # ... if it takes longer than this


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
    """Says once how long all steps will take, from how long the first of them took."""
    started, said = time.perf_counter(), False

    def show(done: int) -> None:
        nonlocal said
        spent = time.perf_counter() - started
        if said or done <= 0 or spent < _FIRST_SECONDS:
            return
        said = True
        if spent / done * total > _LONG_SECONDS:
            print(f"{title}: about {rounded(spent / done * total)} in all", file=sys.stderr, flush=True)

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
