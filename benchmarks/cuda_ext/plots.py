"""Draws what `gpu.py` measured: networks beside the paper's code, layers beside their peers.

    python -m benchmarks.cuda_ext.plots [benchmarks/results/h100.json]

writes `networks.png` and `layers.png` beside the file.
"""

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.cuda_ext import tables
from spdnn_jax import planner
from spdnn_jax.command_line import plots


def draw_networks(content: dict[str, Any], path: Path) -> None:
    """Seconds of each network, as `spdnn plot --figure=networks` draws them."""
    reports = []
    for record in tables.measured(content["records"], "networks"):
        neurons, layers = map(int, record["name"].split("x"))
        reports.append(
            {
                "neurons": neurons,
                "layers": layers,
                "features": record["features"],
                "device": content["device"],
                "compress": record["contender"],
                "seconds": {"inference": record["seconds"]},
            }
        )
    plots.plot_networks(reports, path)


def draw_layers(content: dict[str, Any], path: Path) -> None:
    """Active edges a second of single layers, a column for each kind, our families filled and peers hollow."""
    records = tables.measured(content["records"], "layers")
    kinds = tables.kinds_of(records)
    figure, axis = plt.subplots(figsize=(9, 6), layout="constrained")
    for contender in dict.fromkeys(record["contender"] for record in records):
        chosen = [record for record in records if record["contender"] == contender]
        axis.plot(
            [kinds.index(record["name"]) for record in chosen],
            [record["active_edges_per_second"] / 1e12 for record in chosen],
            "o" if contender in planner.KERNELS else "s",
            label=contender,
            fillstyle="full" if contender in planner.KERNELS else "none",
            alpha=0.8,
        )
    figure.suptitle(f"One layer of 32 edges a neuron, {content['device']}")
    axis.set_xticks(range(len(kinds)), [kind.replace(" ", " neurons,\n") for kind in kinds])
    axis.set_yscale("log")
    axis.set_yticks(ticks := [0.03, 0.1, 0.3, 1, 3, 10, 30], [f"{tick:g}" for tick in ticks])
    axis.set_ylabel("active edges, 10¹² a second")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right")  # pyright: ignore[reportArgumentType]
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    source = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/h100.json")
    found = json.loads(source.read_text(encoding="utf-8"))
    draw_networks(found, source.with_name("networks.png"))
    draw_layers(found, source.with_name("layers.png"))
