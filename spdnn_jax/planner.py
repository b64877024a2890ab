"""Picks what the CUDA back end does with each layer from the figures of its layout, and says why."""

import functools
import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spdnn_jax import costs
from spdnn_jax._native import core
from spdnn_jax.layout import PlanTable

Kernel = Literal["auto", "staged", "grouped", "resident", "chain", "spread"]
"""A kernel family, or the planner's choice."""

KERNELS: tuple[Kernel, ...] = ("auto", "staged", "grouped", "resident", "chain", "spread")

Action = Literal["grouped", "resident", "staged", "chain", "spread", "equal features"]
"""What a step does: a kernel family runs layers, or equal features are looked for."""

_CODES: dict[Action, int] = {  # as in cuda/network.h
    "grouped": 1,
    "resident": 2,
    "staged": 3,
    "equal features": 4,
    "chain": 5,
    "spread": 6,
}
_FUSING: tuple[Action, ...] = ("resident", "chain")  # many layers in a launch

RESIDENT_WIDTH = 16384
"""Widest layer that `auto` keeps resident: two features of it take 128 KiB of a multiprocessor's shared memory, and its
outputs all registers."""

STAGED_BELOW = 2.0
"""`auto` stages layers with fewer outputs in a row group, on average: from here on sharing a feature's reads pays."""

CHAIN_WIDTH = 8192
"""Widest layer of a chain."""

CHAIN_BELOW = 1.25
"""`auto` chains layers with fewer outputs in a row group, on average, and lays each output out alone: a chain shares no
reads among outputs."""

_RESIDENT_ENDS = (3, 6, 10, 18)
"""Layers after which resident launches end. Between launches dead features make room: early, while many die, a launch
is short; then one launch runs to the end."""

_RESIDENT_ENDS_WIDE = (6, 14)
"""The same for layers wider than _WIDE: a block has few features of them, and ends where all are dead."""

_WIDE = 2048

_SHORTEST_CHAIN = 4
"""Layers for whose sake resident ones are cut into two launches."""

_ALONE = 512
"""A layer that is wider, and that no other one can join in a launch, runs grouped: nothing is saved that would pay for
bringing a few features at a time into shared memory."""

_LONGEST_STEP = 4096
"""Layers of one launch at most."""

_NARROWER = 4
"""A resident launch ends where all that follows in it is so many times narrower: a block then has room for more
features."""

_FIRST_SEARCH = 320
"""Equal features are looked for first when a neuron has had so many edges on average, over the layers; then when it has
had twice as many, each time. A search that finds nothing costs about as much as 13 edges: 4% at most."""


@dataclass(frozen=True)
class Step:
    """Layers that one kernel family runs together, or a search for equal features between two layers.

    Attributes:
        action: "grouped" and "staged" (one layer a launch), "resident" and "chain" (all layers of the step in one
            launch), "spread" (all layers of the plan in one launch), or "equal features" (no layer).
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


@dataclass(frozen=True)
class LayoutRule:
    """How layers are laid out, by the outputs of a row group, on average.

    Attributes:
        staged_below: Layers with fewer get the sections of the staged family ...
        staged_wider_than: ... where they have more inputs or outputs than this.
        single_below: Others with fewer have each output in a row group of its own.
    """

    staged_below: float = 0.0
    staged_wider_than: int = 0
    single_below: float = 0.0


def layout_rule(kernel: Kernel, *, for_gpu: bool) -> LayoutRule:
    """How a plan is laid out that such kernels are to run.

    Args:
        kernel: A family to use throughout, or "auto".
        for_gpu: Whether there is a GPU to run it. Staged sections hold all edges again, and no CPU reads them: where
            there is none, "auto" leaves them out.
    """
    rules = {
        "auto": LayoutRule(STAGED_BELOW if for_gpu else 0.0, RESIDENT_WIDTH, CHAIN_BELOW),
        "staged": LayoutRule(math.inf, -1),
        "chain": LayoutRule(single_below=math.inf),
    }
    return rules.get(kernel, LayoutRule())


@functools.cache
def schedule(
    table: PlanTable, kernel: Kernel = "auto", *, narrow_input: bool = False, features: int | None = None
) -> Schedule:
    """Plans the launches.

    Args:
        table: The plan's records.
        kernel: A family to use throughout, or "auto".
        narrow_input: Whether the features come in bytes or bits.
        features: How many there are; None: many.

    Raises:
        ValueError: There is no such family, the plan was built without the sections that it needs, or its records do
            not fit together.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    _check_records(table)
    if kernel == "spread":
        return Schedule((Step("spread", 0, len(table.layers)),), "spread: as asked for")
    if kernel == "auto" and features is not None and costs.spread_pays(table, features):
        return Schedule((Step("spread", 0, len(table.layers)),), f"spread for all ({features} features alone)")
    families = _choose_families(table, kernel, narrow_input)
    searches = _searches(table) if table.header["merge_features"] else set()
    widths = _widths(table)
    steps: list[Step] = []
    for first, end in _stretches(families, searches):
        if first in searches:
            steps.append(Step("equal features", first, first))
        if families[first] not in _FUSING:
            steps += [Step(families[first], layer, layer + 1) for layer in range(first, end)]
            continue
        for part in _fused_launches(widths, first, end):
            alone = kernel == "auto" and part[1] - part[0] == 1 and widths[part[0]] > _ALONE
            steps.append(Step("grouped" if alone else families[first], *part))
    return Schedule(tuple(steps), _reason(steps) if kernel == "auto" else f"{kernel}: as asked for")


def _reason(steps: list[Step]) -> str:
    """Why `auto` made these steps."""
    reasons = {
        "chain": f"outputs share nothing, {CHAIN_WIDTH} neurons wide at most",
        "resident": f"{RESIDENT_WIDTH} neurons wide at most",
        "staged": f"wider, fewer than {STAGED_BELOW:g} outputs in a row group",
        "grouped": "wider, outputs share their inputs or these are bytes; or alone in a launch",
    }
    layers = dict.fromkeys(reasons, 0)
    for step in steps:
        if step.action in layers:
            layers[step.action] += step.end - step.first
    return ", ".join(f"{name} for {layers[name]:,} ({why})" for name, why in reasons.items() if layers[name])


def _check_records(table: PlanTable) -> None:
    """Raises ValueError, with the layer, where records do not fit together: launches and workspace are made by them."""
    try:
        core.check_plan_records(table.records, int(table.header["words"]))
    except ValueError as error:
        raise ValueError(f"the plan is damaged: {error}: build it again") from None


def _widths(table: PlanTable) -> np.ndarray:
    """The greater of inputs and outputs, of each layer."""
    return np.maximum(table.layers["inputs"], table.layers["outputs"])


def _choose_families(table: PlanTable, kernel: Kernel, narrow_input: bool) -> list[Action]:
    count = len(table.layers)
    if kernel != "auto":
        if kernel == "staged" and (table.layers["staged_offset"] < 0).any():
            raise ValueError("this plan was built without staged sections: build it with kernel='staged'")
        if kernel == "chain" and not _fits_chain(table).all():
            raise ValueError(
                f"this plan is no chain: a layer is too wide (more than {CHAIN_WIDTH} neurons), or the plan was built "
                "without kernel='chain'"
            )
        return [kernel] * count
    narrow, staged = _widths(table) <= RESIDENT_WIDTH, table.layers["staged_offset"] >= 0
    if narrow_input:
        staged[:1] = False  # `grouped` reads bytes and bits where they lie: so few that sharing them gains nothing
    chained = _fits_chain(table)
    families: list[Action] = [
        "chain" if chained[layer] else "resident" if narrow[layer] else "staged" if staged[layer] else "grouped"
        for layer in range(count)
    ]
    return _without_short_chains(families)


def _without_short_chains(families: list[Action]) -> list[Action]:
    """Few layers of a chain beside resident ones stay in their launch."""
    kept = list(families)
    for first, end in _stretches(families, set()):
        beside = families[max(first - 1, 0) : end + 1]
        if families[first] == "chain" and end - first < _SHORTEST_CHAIN and "resident" in beside:
            for layer in range(first, end):
                kept[layer] = "resident"
    return kept


def _fits_chain(table: PlanTable) -> np.ndarray:
    """Which layers a chain takes: those whose outputs are laid out alone."""
    alone = _sums_of_runs(table, (table.runs["group_outputs"] > 1).astype(np.int64)) == 0
    return (_widths(table) <= CHAIN_WIDTH) & alone


def _sums_of_runs(table: PlanTable, figures: np.ndarray) -> np.ndarray:
    """The sum over each layer's runs."""
    sums = np.concatenate([[0], np.cumsum(figures)])
    first = table.layers["first_run"]
    return sums[first + table.layers["runs"]] - sums[first]


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


def _fused_launches(widths: np.ndarray, first: int, end: int) -> list[tuple[int, int]]:
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
