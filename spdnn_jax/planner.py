"""Picks the CUDA kernel family of each layer from the figures of its layout, and says why."""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spdnn_jax.layout import PlanTable

Kernel = Literal["auto", "grouped", "resident"]
"""A kernel family, or the planner's choice."""

KERNELS: tuple[Kernel, ...] = ("auto", "grouped", "resident")

_CODES = {"grouped": 1, "resident": 2}  # as cuda_ext/cuda/network.h counts them

RESIDENT_WIDTH = 4096
"""Widest layer that `auto` keeps resident: four features of two such layers fill a multiprocessor's shared memory.
Wider ones would leave too few features to share the loads of the indices."""

_FIRST_STEPS = (3, 3, 4, 8)
"""Layers of the first resident launches. Between launches dead features make room: early, while many die, a launch is
short; then one launch runs to the end."""

_LONGEST_STEP = 4096
"""Layers of one launch at most."""


@dataclass(frozen=True)
class Step:
    """Layers that one family runs together.

    Attributes:
        family: "grouped" (one layer a launch) or "resident" (all layers of the step in one launch).
        first: First layer, counted from 0.
        end: The layer after the last.
    """

    family: str
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
        """int64 (3 * steps,): family, first and end layer of each step, as the native code reads them."""
        rows = [(_CODES[step.family], step.first, step.end) for step in self.steps]
        return np.asarray(rows, np.int64).reshape(-1)


@functools.cache
def schedule(table: PlanTable, kernel: Kernel = "auto") -> Schedule:
    """Plans the launches.

    Args:
        table: The plan's records.
        kernel: A family to use throughout, or "auto".

    Raises:
        ValueError: There is no such family, or the network is too wide for it.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    count = len(table.layers)
    widest = int(max(table.layers["inputs"].max(), table.layers["outputs"].max()))
    if kernel == "auto":
        kernel = "resident" if widest <= RESIDENT_WIDTH else "grouped"
        comparison = "at most" if kernel == "resident" else "more than"
        reason = f"{kernel}: the widest layer has {widest} neurons, {comparison} {RESIDENT_WIDTH}"
    else:
        reason = f"{kernel}: as asked for"
    if kernel == "grouped":
        return Schedule(tuple(Step("grouped", layer, layer + 1) for layer in range(count)), reason)
    return Schedule(_resident_steps(count), reason)


def _resident_steps(count: int) -> tuple[Step, ...]:
    steps, first = [], 0
    for length in (*_FIRST_STEPS, *[_LONGEST_STEP] * (count // _LONGEST_STEP + 1)):
        end = min(first + length, count)
        if end > first:
            steps.append(Step("resident", first, end))
        first = end
    return tuple(steps)
