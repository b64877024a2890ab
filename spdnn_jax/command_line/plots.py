"""Figures drawn from reports."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax._files import replacing
from spdnn_jax.graph_challenge.networks import FEATURES, PAPER_SECONDS

_COMPRESSED = {"none": "not compressed", "neurons": "equal neurons merged", "full": "equal neurons and features merged"}
_PAPER_DEVICE = "one NVIDIA H100"


def plot_layers(reports: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws active features and multiplied edges by layer, and the layers' seconds where a run has profiled them.

    Args:
        reports: As `report.read_reports` returns them.
        path: The figure; the ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The figure cannot be written.
        ValueError: The ending names no format that matplotlib writes.
    """
    pyplot = _pyplot()
    profiled = any(report.get("profile") for report in reports)
    figure, axes = pyplot.subplots(2 + profiled, 1, sharex=True, figsize=(8, 6 + 3 * profiled), layout="constrained")
    figure.suptitle("Layer by layer: " + "; ".join(dict.fromkeys(report["device"] for report in reports)))
    for report in reports:
        layer = np.arange(1, len(report["active"]) + 1)
        before = np.concatenate([[report["features"]], report["active"][:-1]])
        label = f"{report['network']}, {report['inputs']}, {_COMPRESSED[report['compress']]}"
        axes[0].step(layer, report["active"], where="mid", label=label)
        axes[1].step(layer, before * np.asarray(report["multiplied_edges"], float), where="mid", label=label)
        if report.get("profile"):
            seconds = [one["seconds"] for one in report["profile"]]
            kernels = "/".join(dict.fromkeys(one["kernel"] for one in report["profile"]))
            axes[2].step(layer, seconds, where="mid", label=f"{label}: {kernels}")
    titles = {
        "active features after the layer": "",
        "edges multiplied in the layer": "",
        "time of the layer, alone": "s",
    }
    for axis, (title, unit) in zip(axes, titles.items(), strict=False):
        axis.set_ylabel(title)
        _logarithmic(axis, "y", unit)
        _logarithmic(axis, "x")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel("layer")
    for axis in axes[::2]:
        axis.legend()
    _save(figure, path)


def plot_networks(reports: Sequence[dict[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draws the time of inference against the network, a line for each device and compression, beside the paper's code.

    Args:
        reports: As `report.read_reports` returns them. The paper's times are shown for 60,000 features only.
        path: The figure; the ending names the format.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: The figure cannot be written.
        ValueError: The ending names no format that matplotlib writes.
    """
    size = {f"{report['neurons']}x{report['layers']}": (report["neurons"], report["layers"]) for report in reports}
    names = sorted(size, key=size.__getitem__)
    lines: dict[str, dict[str, float]] = {}
    for report in reports:
        line = lines.setdefault(f"{report['device']}, {_COMPRESSED[report['compress']]}", {})
        line[f"{report['neurons']}x{report['layers']}"] = report["seconds"]["inference"]
    devices = list(dict.fromkeys(report["device"] for report in reports))
    paper = {name: PAPER_SECONDS[name] for name in names if name in PAPER_SECONDS}
    if paper and all(report["features"] == FEATURES for report in reports):
        lines[f"{_PAPER_DEVICE}, the paper's code"] = paper
        devices += [] if any("H100" in device for device in devices) else [_PAPER_DEVICE]
    figure, axis = _pyplot().subplots(figsize=(8, 5), layout="constrained")
    counts = sorted({report["features"] for report in reports})
    figure.suptitle(f"Inference of {' or '.join(f'{count:,}' for count in counts)} features")
    if len(devices) > 1:
        axis.set_title(f"on different machines: {'; '.join(devices)}", fontsize="medium")
    for label, line in lines.items():
        axis.plot([names.index(name) for name in line], list(line.values()), "o", label=label)
    axis.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axis.set_xlabel("network: neurons x layers")
    axis.set_ylabel("time, median of a run's repeats")
    _logarithmic(axis, "y", "s")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")
    _save(figure, path)


def _pyplot() -> Any:
    matplotlib: Any = require("matplotlib", extra="plot", purpose="spdnn plot")
    matplotlib.use("agg")
    return require("matplotlib.pyplot", extra="plot", purpose="spdnn plot")


def _logarithmic(axis: Any, direction: str, unit: str = "") -> None:
    """A logarithmic x or y axis with ticks as people write them: 20 ms, 1 k, 30 M."""
    ticker: Any = require("matplotlib.ticker", extra="plot", purpose="spdnn plot")
    axis.set(**{f"{direction}scale": "log"})
    low, high = getattr(axis, f"get_{direction}lim")()
    ticks = getattr(axis, f"{direction}axis")
    ticks.set_major_formatter(ticker.EngFormatter(unit))
    ticks.set_minor_locator(ticker.LogLocator(subs=(2, 5)))
    ticks.set_minor_formatter(ticker.EngFormatter(unit) if high < 1000 * low else ticker.NullFormatter())


def _save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Writes the figure, whole or not at all."""
    try:
        with replacing(path) as file:
            figure.savefig(file, dpi=150, format=Path(path).suffix[1:] or None)
    finally:
        _pyplot().close(figure)
