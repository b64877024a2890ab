"""Which layers XLA's dense product computes: those for which it is the faster one by an estimate that was measured.

The estimate knows a layer's widths and edges, how many outputs share their inputs, and how many features there are; it
knows no network by name. It does not know which features will die on the way: a dense product computes those, too.
"""

import functools
from dataclasses import dataclass
from typing import Literal

import numpy as np

from spdnn_jax.layout import PlanTable

Precision = Literal["float32", "tf32", "bfloat16"]
"""What the inputs of a product may be rounded to. Sums are float32 always."""

PRECISIONS: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")

Device = Literal["cpu", "gpu"]


FEATURES = (1, 8, 64, 512, 4096, 60000)
"""Where costs are known; between them and beyond they follow straight lines of their logarithms."""


@dataclass(frozen=True)
class Costs:
    """What was measured.

    Attributes:
        wider_than: Layers of more inputs than this are wide ones.
        narrow: Picoseconds of an edge, or of a weight of a dense product, with all FEATURES together, in other layers.
        wide: The same in wide ones.
    """

    wider_than: int
    narrow: tuple[float, ...]
    wide: tuple[float, ...]

    def seconds(self, inputs: np.ndarray, features: int) -> np.ndarray:
        """Of an edge or weight, by layer."""
        narrow, wide = (_between(curve, features) for curve in (self.narrow, self.wide))
        return np.where(inputs > self.wider_than, wide, narrow)


def _between(curve: tuple[float, ...], features: int) -> float:
    """Seconds with so many features."""
    if features > FEATURES[-1]:
        return 1e-12 * curve[-1] * features / FEATURES[-1]
    return 1e-12 * float(np.exp(np.interp(np.log(max(features, 1)), np.log(FEATURES), np.log(curve))))


# benchmarks/choice.py measures these, and prints them so. On a CPU their ratios count alone, which hardly depend on how
# many cores there are. Those of the GPU are fits to layers of 1,024 and 4,096 neurons, 1% to 50%, with 1, 64, 4,096 and
# 60,000 features on an H100 (results/choice_gpu.json), and estimates between and beyond.
KERNELS: dict[Device, Costs] = {
    "cpu": Costs(2048, (200, 300, 720, 5800, 47000, 720000), (200, 400, 1500, 13000, 115000, 1700000)),
    "gpu": Costs(8192, (120, 120, 120, 300, 1500, 18700), (160, 160, 160, 700, 4200, 61000)),
}
DENSE: dict[Device, dict[Precision, Costs]] = {
    "cpu": {"float32": Costs(2048, (45, 80, 370, 2300, 18700, 520000), (80, 150, 420, 2350, 20500, 320000))},
    "gpu": {
        "float32": Costs(2048, (1.6, 2, 4.3, 24, 178, 2600), (1.6, 2, 4.3, 23, 165, 2350)),
        "tf32": Costs(2048, (1.6, 1.7, 2, 5, 35, 480), (1.6, 1.7, 2, 4, 22, 290)),
        "bfloat16": Costs(2048, (0.8, 0.9, 1.2, 3.5, 24, 440), (0.8, 0.9, 1.2, 2.5, 15, 195)),
    },
}


@dataclass(frozen=True)
class SpreadCosts:
    """What layers take whose few features are spread over all multiprocessors of a GPU (kernel family `spread`).

    Attributes:
        layer: Seconds of a layer: until all blocks have what all blocks have computed.
        input: Seconds of an input, which every block brings to itself.
        value: Seconds of one feature of an input, of those of a group.
        edge: Seconds of an edge, with a group of features.
        group: Features that share a read of the weights.
        most: Features with which it was measured, at most; it is not taken for more.
        launched: Seconds of a layer, beside its edges, that other families take.
    """

    layer: float
    input: float
    value: float
    edge: float
    group: int
    most: int
    launched: float


SPREAD = SpreadCosts(layer=1.5e-6, input=0.45e-9, value=0.1e-9, edge=5.5e-12, group=8, most=128, launched=1.0e-6)
"""Fitted to layers of 1,024 to 16,384 neurons at densities of 1% to 10%, 1, 8 and 64 features, on an H100: within 10%
but for one feature in layers of many edges, which takes half of it."""

MOVED: dict[Device, float] = {"cpu": 0.0, "gpu": 8e-12}
"""Seconds of a number that the kernels bring in before a plan's first layer, or out behind its last."""

MOST_SHARED: dict[Device, float] = {"cpu": 1.5, "gpu": 4.0}
"""How many times as fast the kernels are, at most, where outputs share their inputs."""

CALL: dict[Device, float] = {"cpu": 5e-6, "gpu": 5e-6}
"""Seconds that a call, of the kernels or of a dense product, takes beside its work."""

COPIED: dict[Device, float] = {"cpu": 1e-10, "gpu": 1e-12}
"""Seconds of a byte of a plan that is called in parts: these are copied out of it."""

GAIN = 1.1
"""A dense product must be so many times as fast as the kernels, by the estimate, to be taken."""

NARROWEST = 512
"""Layers of fewer inputs or outputs were not measured, and stay with the kernels."""

MOST_BYTES = 4 << 30
"""Dense weights of a plan take no more; the densest layers get them first."""

_MOST_EDGES = np.iinfo(np.int32).max  # of a layer whose rows are to be built
_COUNTS = [1 << power for power in range(21)]  # of features: those for which a choice is looked at ahead


def computed_in(precision: Precision, device: Device) -> Precision:
    """What is made of a precision: a CPU computes in float32 whatever is allowed."""
    return precision if precision in DENSE[device] else "float32"


def dense_shapes(table: PlanTable) -> np.ndarray:
    """Inputs and outputs of each layer with all its weights, (layers, 2); the last has the plan's own outputs again."""
    shapes = np.stack([table.layers["inputs"], table.layers["outputs"]], axis=1)
    shapes[-1, 1] = table.header["outputs"]
    return shapes


def density(table: PlanTable, layer: int) -> float:
    """The share of its weights that a layer (counted from 0) has, of those that are left to multiply."""
    record = table.layers[layer]
    return float(record["multiplied_edges"]) / max(float(record["inputs"] * record["outputs"]), 1)


def candidates(table: PlanTable, device: Device, precision: Precision, itemsize: int) -> tuple[int, ...]:
    """Layers for which a dense product is the faster one with some number of features, counted from 0.

    Args:
        table: The plan's records.
        device: Where it will run.
        precision: What may be rounded to.
        itemsize: Bytes of a dense weight.
    """
    faster = np.any([_faster(table, device, precision, count) for count in _COUNTS], axis=0)
    sizes = itemsize * dense_shapes(table).prod(axis=1)
    room, kept = MOST_BYTES, []
    for layer in sorted(np.flatnonzero(faster).tolist(), key=lambda layer: -density(table, layer)):
        room -= int(sizes[layer])
        if room >= 0:
            kept.append(layer)
    return tuple(sorted(kept))


@functools.lru_cache(maxsize=4096)
def chosen(
    table: PlanTable, among: tuple[int, ...], device: Device, precision: Precision, features: int
) -> tuple[int, ...]:
    """Which of these layers are dense products in a call with so many features.

    None of them, where a plan that is called in parts would lose more than they gain.
    """
    faster = _faster(table, device, precision, features)
    dense = [layer for layer in among if faster[layer]]
    kernels, products = _seconds(table, device, precision, features)
    others = np.setdiff1d(np.arange(len(table.layers)), dense)
    gained = float((kernels[dense] - GAIN * products[dense]).sum())
    copied = 4 * float(table.layers["words"][others].sum()) * COPIED[device]
    calls = (len(dense) + len(_stretches(others)) - 1) * CALL[device]
    return tuple(dense) if gained > copied + calls else ()


def when(table: PlanTable, layer: int, device: Device, precision: Precision) -> str:
    """For how many features a dense product is the faster one for a layer, in words."""
    faster = [bool(_faster(table, device, precision, count)[layer]) for count in _COUNTS]
    if all(faster):
        return "for any number of features"
    first, last = _COUNTS[faster.index(True)], _COUNTS[-1 - faster[::-1].index(True)]
    if last == _COUNTS[-1]:
        return f"from {first:,} features on"
    return f"up to {last:,} features" if first == 1 else f"for {first:,} to {last:,} features"


def why_none(table: PlanTable) -> str:
    """Why no layer is a dense product, in words."""
    wide = np.flatnonzero(_is_wide(table))
    if not wide.size:
        return f"narrower than {NARROWEST} neurons"
    fullest = max(density(table, layer) for layer in wide.tolist())
    return f"the kernels are faster at {100 * fullest:.3g}% of the weights"


def spread_pays(table: PlanTable, features: int) -> bool:
    """Whether a GPU had better spread a plan's features, so few as they are, over all multiprocessors."""
    if not 0 < features <= SPREAD.most:
        return False
    others = SPREAD.launched + _edges(table, "gpu") * KERNELS["gpu"].seconds(table.layers["inputs"], features)
    return bool(_spread_seconds(table, features).sum() < others.sum())


def _spread_seconds(table: PlanTable, features: int) -> np.ndarray:
    """Each layer's seconds by kernel family `spread`."""
    groups, of_group = -(-features // SPREAD.group), min(features, SPREAD.group)
    inputs = table.layers["inputs"] * (SPREAD.input + SPREAD.value * of_group)
    return SPREAD.layer + inputs + table.layers["multiplied_edges"] * SPREAD.edge * groups


def _edges(table: PlanTable, device: Device) -> np.ndarray:
    """Each layer's edges, fewer where outputs share their inputs."""
    return table.layers["multiplied_edges"] / np.minimum(_shared(table), MOST_SHARED[device])


def _is_wide(table: PlanTable) -> np.ndarray:
    return np.minimum(table.layers["inputs"], table.layers["outputs"]) >= NARROWEST


def _faster(table: PlanTable, device: Device, precision: Precision, features: int) -> np.ndarray:
    """Whether a dense product is the faster one, by layer."""
    kernels, products = _seconds(table, device, precision, features)
    return _is_wide(table) & (products * GAIN < kernels) & (table.layers["multiplied_edges"] <= _MOST_EDGES)


def _seconds(table: PlanTable, device: Device, precision: Precision, features: int) -> tuple[np.ndarray, np.ndarray]:
    """Each layer's seconds by the kernels, and as a dense product."""
    dense = DENSE[device][computed_in(precision, device)]
    shapes = dense_shapes(table).astype(np.float64)
    inputs = shapes[:, 0]
    kernels = _edges(table, device) * KERNELS[device].seconds(inputs, features)
    if device == "gpu" and features <= SPREAD.most:
        kernels = np.minimum(kernels, _spread_seconds(table, features))
    kernels[0] += features * shapes[0, 0] * MOVED[device]
    kernels[-1] += features * shapes[-1, 1] * MOVED[device]
    return kernels, shapes.prod(axis=1) * dense.seconds(inputs, features)


@functools.lru_cache(maxsize=256)
def _shared(table: PlanTable) -> np.ndarray:
    """How many outputs use an index, on average, by layer."""
    shared = np.ones(len(table.layers))
    for layer in range(len(table.layers)):
        runs = table.runs_of(layer)
        indices = runs["groups"] * runs["edges"]
        if indices.any():
            shared[layer] = (indices * runs["group_outputs"]).sum() / indices.sum()
    return shared


def _stretches(layers: np.ndarray) -> list[np.ndarray]:
    """Layers that lie side by side."""
    return [part for part in np.split(layers, np.flatnonzero(np.diff(layers) > 1) + 1) if part.size]
