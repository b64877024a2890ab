"""Picks what the CUDA back end does with each layer from the figures of its layout, and says why."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spdnn_jax.layout import PlanTable

Kernel = Literal["auto", "staged", "grouped", "resident"]
"""A kernel family, or the planner's choice."""

KERNELS: tuple[Kernel, ...] = ("auto", "staged", "grouped", "resident")

Action = Literal["grouped", "resident", "staged", "equal features"]
"""What a step does: a kernel family runs layers, or equal features are looked for."""

_CODES: dict[Action, int] = {"grouped": 1, "resident": 2, "staged": 3, "equal features": 4}  # as in cuda/network.h

RESIDENT_WIDTH = 16384
"""Widest layer that `auto` keeps resident: two features of it take 128 KiB of a multiprocessor's shared memory, and its
outputs all registers."""

STAGED_BELOW = 2.0
"""`auto` stages layers with fewer outputs in a row group, on average: from here on sharing a feature's reads pays."""

_RESIDENT_ENDS = (3, 6, 10, 18)
"""Layers after which resident launches end. Between launches dead features make room: early, while many die, a launch
is short; then one launch runs to the end."""

_RESIDENT_ENDS_WIDE = (6, 14)
"""The same for layers wider than _WIDE: a block has few features of them, and ends where all are dead."""

_WIDE = 2048

_LONGEST_STEP = 4096
"""Layers of one launch at most."""

_NARROWER = 4
"""A resident launch ends where all that follows in it is so many times narrower: a block then has room for more
features."""

_FIRST_SEARCH = 1280
"""Equal features are looked for first when a neuron has had so many edges on average, over the layers; then when it has
had twice as many, each time. A search costs about as much as 40: so it takes 3% of the time where it finds nothing."""


@dataclass(frozen=True)
class Step:
    """Layers that one kernel family runs together, or a search for equal features between two layers.

    Attributes:
        action: "grouped" and "staged" (one layer a launch), "resident" (all layers of the step in one launch), or
            "equal features" (no layer).
        first: First layer, counted from 0.
        end: The layer after the last.
    """

    action: Action
    first: int
    end: int


@dataclass(frozen=True)
class Schedule:
    """How the CUDA back end runs a plan.

    Attributes:
        steps: The steps in order.
        reason: Why they are as they are, in words.
    """

    steps: tuple[Step, ...]
    reason: str

    @property
    def records(self) -> np.ndarray:
        """int64 (3 * steps,): action, first and end layer of each step, as the native code reads them."""
        rows = [(_CODES[step.action], step.first, step.end) for step in self.steps]
        return np.asarray(rows, np.int64).reshape(-1)

    @property
    def families(self) -> list[Action]:
        """The kernel family of each layer."""
        return [step.action for step in self.steps for _ in range(step.first, step.end)]


def staged_rule(kernel: Kernel) -> tuple[float, int]:
    """Which layers get the sections of the staged family, for a plan that such kernels are to run.

    Args:
        kernel: A family to use throughout, or "auto".

    Returns:
        Layers with fewer outputs in a row group, on average, than this, and more inputs or outputs than that.
    """
    if kernel == "staged":
        return math.inf, -1
    return (STAGED_BELOW, RESIDENT_WIDTH) if kernel == "auto" else (0.0, 0)


@functools.cache
def schedule(table: PlanTable, kernel: Kernel = "auto") -> Schedule:
    """Plans the launches.

    Args:
        table: The plan's records.
        kernel: A family to use throughout, or "auto".

    Raises:
        ValueError: There is no such family, or the plan was built without the sections that it needs.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    families, reason = _choose_families(table, kernel)
    searches = _searches(table) if table.header["merge_features"] else set()
    steps: list[Step] = []
    for first, end in _stretches(families, searches):
        if first in searches:
            steps.append(Step("equal features", first, first))
        if families[first] == "resident":
            steps += [Step("resident", *part) for part in _resident_launches(_widths(table), first, end)]
        else:
            steps += [Step(families[first], layer, layer + 1) for layer in range(first, end)]
    return Schedule(tuple(steps), reason)


def _widths(table: PlanTable) -> np.ndarray:
    """The greater of inputs and outputs, of each layer."""
    return np.maximum(table.layers["inputs"], table.layers["outputs"])


def _choose_families(table: PlanTable, kernel: Kernel) -> tuple[list[Action], str]:
    count = len(table.layers)
    if kernel != "auto":
        if kernel == "staged" and (table.layers["staged_offset"] < 0).any():
            raise ValueError("this plan was built without staged sections: build it with kernel='staged'")
        return [kernel] * count, f"{kernel}: as asked for"
    narrow, staged = _widths(table) <= RESIDENT_WIDTH, table.layers["staged_offset"] >= 0
    families: list[Action] = [
        "resident" if narrow[layer] else "staged" if staged[layer] else "grouped" for layer in range(count)
    ]
    reasons = {
        "resident": f"{RESIDENT_WIDTH} neurons wide at most",
        "staged": f"wider, fewer than {STAGED_BELOW:g} outputs in a row group",
        "grouped": "wider, outputs share their inputs",
    }
    used = [f"{name} for {families.count(name):,} ({why})" for name, why in reasons.items() if name in families]
    return families, ", ".join(used)


def _searches(table: PlanTable) -> set[int]:
    """Layers before which equal features are looked for."""
    edges = np.cumsum(table.layers["multiplied_edges"] / np.maximum(table.layers["outputs"], 1))
    found, due = set(), _FIRST_SEARCH
    for layer in range(1, len(edges)):
        if edges[layer - 1] >= due:
            found.add(layer)
            due = 2 * edges[layer - 1]
    return found


def _stretches(families: list[Action], cuts: set[int]) -> list[tuple[int, int]]:
    """Layers of one family side by side, cut where something is to be done between them."""
    count = len(families)
    starts = [k for k in range(count) if k == 0 or k in cuts or families[k] != families[k - 1]]
    return list(zip(starts, [*starts[1:], count], strict=True))


def _resident_launches(widths: np.ndarray, first: int, end: int) -> list[tuple[int, int]]:
    launches = []
    while first < end:
        ends = _RESIDENT_ENDS_WIDE if widths[first] > _WIDE else _RESIDENT_ENDS
        stop = min((limit for limit in ends if limit > first), default=first + _LONGEST_STEP)
        stop = _before_narrower(widths, first, min(stop, end))
        launches.append((first, stop))
        first = stop
    return launches


def _before_narrower(widths: np.ndarray, first: int, end: int) -> int:
    """Where a launch of these layers had better end: before the rest of it is much narrower than its first layer."""
    for layer in range(first + 1, end):
        if widths[layer:end].max() * _NARROWER <= widths[first]:
            return layer
    return end
