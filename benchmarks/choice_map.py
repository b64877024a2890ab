"""A heat map of what `choice.py` measured: how many times as fast `infer` is as the best of the others.

    python -m benchmarks.choice_map [benchmarks/results/choice_gpu.json]

One panel for each width and precision; blue where `infer` is the faster one, red where another is, whose name stands
below the figure. The others of a precision are those that round no more than it allows. What `spdnn_jax/costs.py` holds
is printed, too.
"""

import importlib.util
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

from spdnn_jax import costs

_EXACT = ("dense float32", "JAX BCOO", "cuSPARSE CSR, by feature", "cuSPARSE CSR, by neuron")
OTHERS = {
    "float32": _EXACT,
    "tf32": (*_EXACT, "dense TF32"),
    "bfloat16": (*_EXACT, "dense TF32", "dense bf16"),
}
"""Contenders by the precision that `infer` was allowed."""

_SHORT = {
    "JAX BCOO": "BCOO", "cuSPARSE CSR, by feature": "cuSPARSE", "cuSPARSE CSR, by neuron": "cuSPARSE",
    "dense float32": "dense", "dense TF32": "TF32", "dense bf16": "bf16",
}  # fmt: skip
_DENSE = {"float32": "dense float32", "tf32": "dense TF32", "bfloat16": "dense bf16"}
_CLOSE = 3.0  # times: where kernels and dense product differ by more, no choice depends on how much
_LIMIT = 8  # times: colours go no further

Point = tuple[int, float, int]
"""Neurons, density, features."""


def points(content: dict[str, Any]) -> dict[Point, dict[str, dict[str, Any]]]:
    """The records with figures, by point and contender."""
    found: dict[Point, dict[str, dict[str, Any]]] = {}
    for record in content["records"]:
        if "seconds" in record:
            point = record["neurons"], record["density"], record["features"]
            found.setdefault(point, {})[record["contender"]] = record
    return found


def ratios(content: dict[str, Any], precision: str) -> dict[Point, tuple[float, str]]:
    """For each point the best other's seconds by those of `infer`, and the other's name."""
    found = {}
    for point, records in points(content).items():
        by_name = {name: record["seconds"] for name, record in records.items()}
        others = {name: by_name[name] for name in OTHERS[precision] if name in by_name}
        ours = by_name.get(f"infer, {precision}")
        if ours is not None and others:
            best = min(others, key=lambda name: others[name])
            found[point] = others[best] / ours, _SHORT.get(best, best)
    return found


def print_costs(content: dict[str, Any]) -> None:
    """Picoseconds by number of features, as `costs.py` holds them: of an edge by the kernels, of a weight if dense.

    A dense product of a precision is `infer`'s own where it took one, else the peer's.
    """
    device = "gpu" if content["runs"][-1]["settings"]["gpu"] else "cpu"
    kernels, dense = costs.KERNELS[device], costs.DENSE[device]
    found: dict[tuple[str, bool], dict[int, list[float]]] = {}

    def add(name: str, wider_than: int, point: Point, picoseconds: float) -> None:
        found.setdefault((name, point[0] > wider_than), {}).setdefault(point[2], []).append(picoseconds)

    for point, records in points(content).items():
        for precision, curve in dense.items():
            own = records.get(f"infer, {precision}", {})
            product = own if own.get("dense") else records.get(_DENSE[precision])
            if product is None or "kernels" not in records:
                continue
            times = records["kernels"]["minimum"] / product["minimum"]
            if 1 / _CLOSE < times < _CLOSE:
                record = records["kernels"]
                add("kernels", kernels.wider_than, point, 1e12 * record["minimum"] / record["edges"])
                add(f"dense {precision}", curve.wider_than, point, 1e12 * product["minimum"] / point[0] ** 2)
    for (name, is_wide), by_count in sorted(found.items()):
        figures = ", ".join(f"{count:,}: {statistics.median(by_count[count]):.3g}" for count in sorted(by_count))
        print(f"{name}, {'wide' if is_wide else 'narrow'}, ps by features: {figures}")


def report(path: str) -> None:
    """Prints what a file says, and draws the map beside it, as a PNG, where matplotlib is installed."""
    content = json.loads(Path(path).read_text(encoding="utf-8"))
    maps = {precision: found for precision in OTHERS if (found := ratios(content, precision))}
    print_costs(content)
    for precision, found in maps.items():
        lost = sum(ratio < 1 / 1.1 for ratio, _ in found.values())
        worst = min(found, key=lambda point: found[point][0])
        print(
            f"{precision}: slower than 1.1 times the best other at {lost} of {len(found)} points; at worst "
            f"{1 / found[worst][0]:.2f} times ({found[worst][1]}) at {worst[0]} neurons, {100 * worst[1]:g}%, "
            f"{worst[2]} features"
        )
    if not maps:
        print("nothing to draw: no point has figures of infer and of another")
    elif importlib.util.find_spec("matplotlib") is None:
        print(f"matplotlib is not installed: python -m benchmarks.choice_map {path} draws the map where it is")
    else:
        _draw(maps, f"infer beside the best other, one layer; {content['device']}", Path(path).with_suffix(".png"))


def _draw(maps: dict[str, dict[Point, tuple[float, str]]], title: str, path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    neurons = sorted({point[0] for found in maps.values() for point in found})
    figure, axes = plt.subplots(
        len(maps), len(neurons), figsize=(1.2 + 3.4 * len(neurons), 0.8 + 3.0 * len(maps)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    image: Any = None
    for row, (precision, found) in zip(axes, maps.items(), strict=True):
        for axis, width in zip(row, neurons, strict=True):
            panel = {point[1:]: ratio for point, ratio in found.items() if point[0] == width}
            image = _panel(axis, panel, f"{width:,} neurons, {precision}")
    bar = figure.colorbar(image, ax=axes, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    bar.set_label("times as fast as the best other")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(axis: Any, panel: dict[tuple[float, int], tuple[float, str]], title: str) -> Any:
    densities, features = sorted({density for density, _ in panel}), sorted({count for _, count in panel})
    colours = [[_colour(panel, density, count) for count in features] for density in densities]
    bound = math.log2(_LIMIT)
    image = axis.imshow(colours or [[math.nan]], origin="lower", cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto")
    for (density, count), (ratio, best) in panel.items():
        text = f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
        place = features.index(count), densities.index(density)
        dark = abs(math.log2(ratio)) > bound / 2
        axis.text(*place, f"{text}\n{best}", ha="center", va="center", fontsize=6, color="w" if dark else "k")
    axis.set_xticks(range(len(features)), [f"{count:,}" for count in features], fontsize=8)
    axis.set_yticks(range(len(densities)), [f"{100 * density:g}%" for density in densities], fontsize=8)
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("features", fontsize=8)
    axis.set_ylabel("density", fontsize=8)
    return image


def _colour(panel: dict[tuple[float, int], tuple[float, str]], density: float, count: int) -> float:
    ratio = panel.get((density, count))
    return math.log2(min(max(ratio[0], 1 / _LIMIT), _LIMIT)) if ratio else math.nan


if __name__ == "__main__":
    report(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/choice_gpu.json")
