"""How far a step is."""

import itertools
import time

import pytest

from spdnn_jax.command_line.progress import progress_bar


def test_progress_bar_counts_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps report how many are done so far; a bar that added them up would pass 100%."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress_bar("working", 4) as progress:
        for done in (1, 2, 4):
            progress(done)
        bar = progress.bar  # pyright: ignore[reportFunctionMemberAccess]
        assert (bar.n, bar.total) == (4, 4)
    assert "working" in capsys.readouterr().err


def test_progress_without_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("working", 4) as progress:
        progress(4)
    captured = capsys.readouterr()
    assert captured.err == "working ...\n"
    assert captured.out == ""


@pytest.mark.parametrize(
    ("total", "steps", "said"),
    [
        (4, [0.75] * 4, ""),
        (100, [0.75] * 10, "working: about 75 seconds in all\n"),
        (40_000, [0.75] * 100, "working: about 8 hours in all\n"),
        (120, [30, 10, 5, 1, 0.1, 0.1, 0.1], "working: about 58 seconds in all\n"),  # an oracle's, as features die
    ],
)
def test_long_steps_say_how_long(
    total: int, steps: list[float], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Once, as soon as the steps tell something."""
    clock = itertools.accumulate([0, *steps])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with progress_bar("working", total) as progress:
        for done in range(1, len(steps) + 1):
            progress(done)
    assert capsys.readouterr().err == f"working ...\n{said}"
