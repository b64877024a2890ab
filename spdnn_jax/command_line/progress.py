"""How far a step is, on standard error."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from spdnn_jax._extras import require


@contextlib.contextmanager
def progress_bar(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar on standard error; yields a function that takes the number of steps done.

    Without tqdm, or where standard error is no terminal, a line says what is under way instead.
    """
    try:
        tqdm: Any = require("tqdm", extra="data", purpose="progress bars").tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        print(f"{title} ...", file=sys.stderr, flush=True)
        yield lambda done: None
        return
    with tqdm(desc=title, total=total, file=sys.stderr, leave=False) as bar:

        def show(done: int) -> None:
            bar.update(done - bar.n)

        show.bar = bar  # pyright: ignore[reportFunctionMemberAccess]
        yield show


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
