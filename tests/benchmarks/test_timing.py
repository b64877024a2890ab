"""How work is timed: what is waited for, what is not timed, and when it ends."""

from benchmarks.timing import Timing, measure, measure_in_turn


def test_measure_waits_once_a_repeat() -> None:
    started: list[int] = []
    waited: list[int] = []

    def run() -> int:
        started.append(len(started))
        return len(started)

    timing = measure(run, waited.append, repeats=4, calls=5)
    assert len(started) == 2 + 4 * 5
    assert waited == [1, 2, 7, 12, 17, 22]
    assert (len(timing.seconds), timing.calls) == (4, 5)


def test_a_spent_budget_ends_with_three_repeats() -> None:
    assert len(measure(lambda: None, lambda _: None, repeats=9, calls=1, budget=0.0).seconds) == 3
    assert Timing([3.0, 1.0, 2.0], 1).as_record() == {
        "seconds": 2.0, "minimum": 1.0, "repeats": [3.0, 1.0, 2.0], "calls_per_repeat": 1,
    }  # fmt: skip


def test_contenders_take_turns_after_a_call_that_is_not_timed() -> None:
    calls: list[str] = []
    timings = measure_in_turn({name: lambda name=name: calls.append(name) for name in "ab"}, repeats=3)
    assert calls == list("ab" * 4)
    assert [(name, len(timing.seconds), timing.calls) for name, timing in timings.items()] == [("a", 3, 1), ("b", 3, 1)]
