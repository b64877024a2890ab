"""Times work: of a device that does it asynchronously, and of contenders that take turns."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

_SHORTEST = 0.02  # seconds of one repeat: short calls are queued one after the other until it is reached
_MOST_CALLS = 200
_FEWEST_REPEATS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds of a call.

    Attributes:
        seconds: Of every repeat, for one call.
        calls: Calls of a repeat, queued one after the other before the device is waited for.
    """

    seconds: list[float]
    calls: int

    @property
    def median(self) -> float:
        """Median over the repeats."""
        return statistics.median(self.seconds)

    def as_record(self) -> dict[str, Any]:
        """What results files keep of it."""
        minimum = min(self.seconds)
        return {"seconds": self.median, "minimum": minimum, "repeats": self.seconds, "calls_per_repeat": self.calls}


def measure(
    run: Callable[[], Any],
    wait: Callable[[Any], Any],
    *,
    repeats: int = 10,
    calls: int | None = None,
    budget: float = 30.0,
) -> Timing:
    """Times calls after two that are not timed.

    Args:
        run: Starts the work; returns what is to be waited for.
        wait: Waits for what the last call returned, and with it for all calls before.
        repeats: Timed repeats.
        calls: Calls of a repeat; by default as many as make a repeat long enough to be timed.
        budget: Seconds after which no more than three repeats are made.
    """
    wait(run())
    start = time.perf_counter()
    wait(run())
    once = time.perf_counter() - start
    calls = calls or min(max(math.ceil(_SHORTEST / max(once, 1e-9)), 1), _MOST_CALLS)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < repeats and (len(seconds) < _FEWEST_REPEATS or time.perf_counter() - begin < budget):
        start = time.perf_counter()
        for _ in range(calls - 1):
            run()
        wait(run())
        seconds.append((time.perf_counter() - start) / calls)
    return Timing(seconds, calls)


def measure_in_turn(contenders: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, Timing]:
    """Times contenders by turns, so that whatever else the machine does meets them all alike.

    Args:
        contenders: By name, what does the work and waits for it; called once before, which is not timed.
        repeats: Timed calls of each.
    """
    for run in contenders.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(times, 1) for name, times in seconds.items()}
