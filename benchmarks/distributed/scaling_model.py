r"""Throughput on up to 1,024 GPUs, from what `scaling.py` measured, checked against its runs on several.

    python -m benchmarks.distributed.scaling_model benchmarks/results/scaling.json \
        [--page=benchmarks/distributed/scaling.md] [--plot=benchmarks/results/scaling.png]

A device takes `layers * a + b * (features before layer 1 + before layer 2 + ...)` seconds: `a` is what a layer costs
whatever it holds (its launch, its weights), `b` what a feature costs in a layer. Both are fitted for each width to the
runs of a single device on its share. Deeper networks than the measured one go on with the features that its last layer
left, as the challenge's do.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.results_file import command
from spdnn_jax.graph_challenge import networks

BEGIN, END = "<!-- figures: written by scaling_model.py -->", "<!-- end of figures -->"


@dataclass(frozen=True)
class Model:
    """Seconds of one device.

    Attributes:
        layer: Seconds of a layer, whatever it holds.
        feature: Seconds of a feature in a layer.
        error: The largest relative error over the runs that the model was fitted to.
    """

    layer: float
    feature: float
    error: float

    def seconds(self, before: np.ndarray) -> float:
        """Seconds of a device that has so many features before each layer, (layers,)."""
        return len(before) * self.layer + float(before.sum()) * self.feature


def features_before(features: int, active: list[int], layers: int) -> np.ndarray:
    """Features before each of so many layers, the survivors of a shallower network going on to the end, (layers,)."""
    before = np.asarray([features, *active], float)
    return np.pad(before, (0, max(0, layers - len(before))), mode="edge")[:layers]


def fit(runs: list[dict[str, Any]]) -> Model:
    """Fits the model to runs of one device with different numbers of features, all errors relative.

    Raises:
        ValueError: There are fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError(
            f"a model needs runs of two shares at least, found {len(runs)}: run scaling.py with more features"
        )
    rows = np.asarray([(len(run["active"]), _work(run)) for run in runs], float)
    seconds = np.asarray([run["seconds"] for run in runs])
    scaled = rows / seconds[:, None]
    costs = np.linalg.lstsq(scaled, np.ones(len(runs)), rcond=None)[0]
    for negative in np.flatnonzero(costs < 0):  # of two costs at most one is: then the other explains all
        costs[negative], other = 0, 1 - negative
        costs[other] = scaled[:, other].sum() / (scaled[:, other] ** 2).sum()
    return Model(*map(float, costs), error=float(np.abs(scaled @ costs - 1).max()))


def _work(run: dict[str, Any]) -> float:
    return float(features_before(run["features"], run["active"], len(run["active"])).sum())


def check(model: Model, run: dict[str, Any]) -> float:
    """Seconds that the model gives for a run on several devices: those of its fullest."""
    uneven = np.asarray([1.0, *run["fullest_over_mean"][:-1]])
    before = features_before(run["features"], run["active"], len(run["active"])) / run["devices"]
    return model.seconds(before * uneven)


def predict(model: Model, network: dict[str, Any], layers: int) -> list[tuple[int, float]]:
    """(devices, nominal edges/s) of a network of this width and so many layers."""
    edges = network["features"] * network["edges"] / network["layers"] * layers
    return [
        (share["of"], edges / model.seconds(features_before(share["features"], share["active"], layers)))
        for share in network["alone"]
    ]


def page(content: dict[str, Any], made_by: str) -> str:
    """The figures as Markdown."""
    lines = [
        f"Made by `{made_by}` from runs of `{content['command']}` on {content['devices']} x {content['device']}, "
        f"jax {content['versions']['jax']}; {content['timed']}.",
        "",
        "| network, compress | seconds a layer | seconds a feature and layer | worst error of the fit |",
        "| --- | --- | --- | --- |",
    ]
    models = [(network, fit(network["alone"])) for network in content["networks"]]
    lines += [
        f"| {_name(network)} | {model.layer:.3g} | {model.feature:.3g} | {100 * model.error:.0f}% |"
        for network, model in models
    ]
    lines += [
        "",
        "| run | devices | features | seconds, measured | seconds, model | nominal TE/s | speedup |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {_name(network)}, {run['kind']} | {run['devices']} | {run['features']:,} | {run['seconds']:.5f} "
        f"| {check(model, run):.5f} | {run['nominal_edges_per_second'] / 1e12:.3g} "
        f"| {format(run['speedup'], '.2f') if 'speedup' in run else ''} |"
        for network, model in models
        for run in network["runs"]
    ]
    devices = [share["of"] for share in content["networks"][0]["alone"]]
    lines += [
        "",
        "Predicted nominal TE/s:",
        "",
        f"| network | {' | '.join(map(str, devices))} |",
        f"| --- |{' --- |' * len(devices)}",
    ]
    lines += [
        f"| {network['neurons']} x {layers} | {' | '.join(f'{rate / 1e12:.3g}' for _, rate in predictions)} |"
        for network, model in models
        for layers in networks.LAYERS
        for predictions in [predict(model, network, layers)]
    ]
    return "\n".join(lines)


def _name(network: dict[str, Any]) -> str:
    return f"{network['network']}, {network['compress']}"


def write_page(path: Path, figures: str) -> None:
    """Puts the figures between the marks of the page.

    Raises:
        OSError: The page cannot be read or written.
        ValueError: It has no marks.
    """
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise ValueError(f"{path} has no marks {BEGIN} and {END}: put them where the figures belong")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    path.write_text(f"{head}{BEGIN}\n\n{figures}\n\n{END}{tail}", encoding="utf-8")


def plot(content: dict[str, Any], path: Path) -> None:
    """Draws predicted throughput by number of devices, with the measured runs as dots."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    styles = dict(zip(networks.LAYERS, (":", "--", "-"), strict=True))
    for number, network in enumerate(content["networks"]):
        model, color = fit(network["alone"]), f"C{number}"
        for layers in networks.LAYERS:
            devices, rates = zip(*predict(model, network, layers), strict=True)
            axes.plot(
                devices, np.asarray(rates) / 1e12, styles[layers], color=color, label=f"{network['neurons']} x {layers}"
            )
        strong = [run for run in network["runs"] if run["kind"] == "strong"]
        axes.plot(
            [run["devices"] for run in strong],
            [run["nominal_edges_per_second"] / 1e12 for run in strong],
            "o", color=color, label=f"{_name(network)}, measured",
        )  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="devices", ylabel="nominal TE/s")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Prints the figures, and writes them where asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="what scaling.py wrote")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    content = json.loads(arguments.runs.read_text(encoding="utf-8"))
    figures = page(content, command())
    print(figures)
    if arguments.page:
        write_page(arguments.page, figures)
    if arguments.plot:
        plot(content, arguments.plot)


if __name__ == "__main__":
    main()
