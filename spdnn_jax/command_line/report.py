"""What a run tells people and programs: the result table, and JSON."""

import importlib.metadata
import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spdnn_jax._files import replacing
from spdnn_jax._native import usable_cores
from spdnn_jax.graph_challenge.networks import active_edges, nominal_edges
from spdnn_jax.simplify import COMPRESS

_SHOWN_DEVICES = 16


@dataclass
class Report:
    """The result of one run. Times are in seconds; written to JSON field by field.

    Attributes:
        network: What was run: "1024 x 120, radixnet".
        neurons: Width.
        layers: Number of layers.
        features: Number of input features.
        inputs: Where the features came from.
        edges: Stored edges of the original network.
        device: What ran it: the GPU, or the processor and its cores.
        backend: Back end that ran: cuda, cpu or xla.
        compress: The --compress setting.
        versions: Of Python, this package, jax, jaxlib and NumPy.
        command: The command line.
        seconds: Of each step: read, plan, inputs, compile, inference (the median of `inference_seconds`).
        inference_seconds: Of every repeat, from device-resident input to device-resident categories; of the slowest
            process, and from input on the host, if it takes several passes.
        nominal_edges_per_second: features x edges / seconds.
        active_edges_per_second: Edges truly multiplied / seconds; None with --compress=full, where equal features are
            merged on the way, and not counted.
        active: Active features after each layer, merged ones included.
        layer_edges: Stored edges of each layer of the original network.
        multiplied_edges: Edges of each layer that are multiplied for an active feature: fewer where equal neurons were
            merged.
        categories: Number of categories.
        check: Result of the check against the float64 oracle, or None.
        largest_difference: Of the checked features' activations after the last layer from the oracle's, or None.
        close_calls: Checked features whose category float32 may see otherwise (docs/numerics.md), or None.
        truth: Result of the comparison with the truth file, or None.
        right: Features whose largest output is their label; None without --labels.
        accuracy: The share of these.
        profile: Of each layer, run by itself, the fields of `profiling.LayerProfile`; None without --profile_layers.
        devices: Number of devices that shared the features.
        processes: Number of processes that they belong to.
        active_of_devices: Active features of each device after each layer, where there are several.
        stream_layers: Layers of a piece, where weights were streamed, or None.
        passes: Parts that the features were run in, more than one where they do not fit on the devices together.
    """

    network: str
    neurons: int
    layers: int
    features: int
    inputs: str
    edges: int
    device: str
    backend: str
    compress: str
    versions: dict[str, str]
    command: str
    seconds: dict[str, float]
    inference_seconds: list[float]
    active: list[int]
    layer_edges: list[int]
    multiplied_edges: list[int]
    categories: int
    check: str | None = None
    largest_difference: float | None = None
    close_calls: int | None = None
    truth: str | None = None
    right: int | None = None
    profile: list[dict[str, Any]] | None = None
    devices: int = 1
    processes: int = 1
    active_of_devices: list[list[int]] = field(default_factory=list)
    stream_layers: int | None = None
    passes: int = 1
    nominal_edges_per_second: float = field(init=False)
    active_edges_per_second: float | None = field(init=False)
    accuracy: float | None = field(init=False)

    def __post_init__(self) -> None:
        inference = self.seconds["inference"]
        self.nominal_edges_per_second = nominal_edges(self.features, np.asarray(self.layer_edges)) / inference
        multiplied = active_edges(self.features, np.asarray(self.multiplied_edges), np.asarray(self.active))
        self.active_edges_per_second = None if self.compress == "full" else multiplied / inference
        self.accuracy = None if self.right is None else self.right / self.features

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON, whole or not at all.

        Raises:
            OSError: The file cannot be written.
        """
        write_json(path, asdict(self))

    def table(self) -> str:
        """The result table for people."""
        repeats = len(self.inference_seconds)
        rows = [
            ("network", f"{self.network}: {self.edges:,} edges"),
            ("features", f"{self.features:,} ({self.inputs})"),
            ("back end", f"{self.backend} on {self.device}, --compress={self.compress}"),
            ("multiplied", f"{100 * sum(self.multiplied_edges) / max(self.edges, 1):.1f}% of the edges"),
            ("versions", ", ".join(f"{name} {version}" for name, version in self.versions.items())),
            (
                "seconds",
                ", ".join(f"{step} {spent:.3g}" for step, spent in self.seconds.items() if step != "inference"),
            ),
            *self._spread(),
            (
                "inference",
                f"{self.seconds['inference']:.4g} s, median of {repeats}: "
                f"{'host' if self.passes > 1 else 'device'}-resident input to categories",
            ),
            ("nominal", f"{rate(self.nominal_edges_per_second)}: features x edges of the original network / seconds"),
            ("active", self._active_rate()),
            ("active features", self._survivors()),
            *(
                (f"layer {layer} alone", self._profile_text(layer))
                for layer in shown_layers(self.layers)
                if self.profile
            ),
            ("categories", f"{self.categories:,}"),
        ]
        if self.accuracy is not None:
            rows.append(("accuracy", f"{100 * self.accuracy:.2f}%: {self.right:,} of {self.features:,} labels"))
        said = (("check", self.check), ("exactness", self._exactness()), ("truth", self.truth))
        rows += [(name, text) for name, text in said if text]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)

    def _exactness(self) -> str | None:
        if self.close_calls is None:
            return None
        calls = "close call" if self.close_calls == 1 else "close calls"
        off = self.largest_difference
        differ = "" if off is None else f"activations differ from float64's by {off:.2g} at most; "
        return f"{differ}{self.close_calls:,} {calls} among the categories"

    def _active_rate(self) -> str:
        if self.active_edges_per_second is None:
            return "not known: equal features are merged on the way, uncounted"
        return f"{rate(self.active_edges_per_second)}: edges truly multiplied / seconds"

    def _survivors(self) -> str:
        """Active features after some of the layers."""
        return "layer " + "; ".join(f"{layer}: {self.active[layer - 1]:,}" for layer in shown_layers(self.layers))

    def _profile_text(self, layer: int) -> str:
        assert self.profile is not None
        one = self.profile[layer - 1]
        return (
            f"{duration(one['seconds'])}, {one['kernel']}, {one['features']:,} features, "
            f"{rate(one['active_edges_per_second'])} active"
        )

    def _spread(self) -> list[tuple[str, str]]:
        """What the table says of a run on several devices, or in several parts."""
        rows = []
        if self.active_of_devices:
            last = [layers[-1] for layers in self.active_of_devices]
            uneven = max(last) * len(last) / max(sum(last), 1)
            rows.append(("devices", f"{self.devices} of {self.processes} processes"))
            rows.append(("on each", f"{_listed(last)} active at the end; the fullest has {uneven:.3f} times the mean"))
        if self.stream_layers is not None:
            rows.append(("weights", f"streamed, {self.stream_layers} layers at a time"))
        if self.passes > 1:
            rows.append(("passes", f"{self.passes}: the features do not fit on the devices together"))
        return rows


def duration(seconds: float) -> str:
    """Seconds for people, in s, ms or us."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def _listed(counts: list[int]) -> str:
    shown = ", ".join(f"{count:,}" for count in counts[:_SHOWN_DEVICES])
    return shown if len(counts) <= _SHOWN_DEVICES else f"{shown} ... ({min(counts):,} to {max(counts):,})"


def shown_layers(layers: int) -> list[int]:
    """Layers of which the table tells: 1, 3, 10, 30 ... and the last."""
    steps = (scale * step for scale in (1, 10, 100, 1000, 10000) for step in (1, 3))
    return sorted({layers, *(layer for layer in steps if layer < layers)} - {0})


def rate(edges_per_second: float) -> str:
    """Edges a second for people, in GE/s or TE/s."""
    unit, scale = ("TE/s", 1e12) if edges_per_second >= 1e12 else ("GE/s", 1e9)
    return f"{edges_per_second / scale:.4g} {unit}"


def device() -> str:
    """The device that JAX runs on: a GPU as JAX names it, or the processor and how many cores this process may use."""
    kind = jax.devices()[0].device_kind
    return processor() if kind == "cpu" else kind


def processor() -> str:
    """The processor, and how many of its cores this process may use."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(models, platform.machine())}, {usable_cores()} cores"


def versions() -> dict[str, str]:
    """Versions of what a figure depends on."""
    import spdnn_jax

    return {
        "spdnn_jax": spdnn_jax.__version__,
        "jax": jax.__version__,
        "jaxlib": importlib.metadata.version("jaxlib"),
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Writes JSON, whole or not at all.

    Raises:
        OSError: The file cannot be written.
    """
    with replacing(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_profile(value: Any) -> bool:
    return value is None or all(_is_number(one["seconds"]) and isinstance(one["kernel"], str) for one in value)


_DRAWN: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("network", "inputs", "device"), lambda value: isinstance(value, str)),
    "compress": lambda value: value in COMPRESS,
    **dict.fromkeys(("neurons", "layers", "features"), _is_count),
    **dict.fromkeys(
        ("active", "multiplied_edges"), lambda value: isinstance(value, list) and all(map(_is_count, value))
    ),
    "seconds": lambda value: _is_number(value["inference"]),
}
"""What figures are made of, and what it has to be."""


def _amiss(report: Any) -> str | None:
    """What a report lacks, or None."""
    if not isinstance(report, dict):
        return next(iter(_DRAWN))
    for name, holds in (*_DRAWN.items(), ("profile", _is_profile)):
        try:
            sound = (name in report or name == "profile") and holds(report.get(name))
        except (TypeError, LookupError):
            sound = False
        if not sound:
            return name
    by_layer = [report["active"], report["multiplied_edges"], *([report["profile"]] if report.get("profile") else [])]
    return None if len(set(map(len, by_layer))) == 1 else "layers"


def read_reports(paths: Sequence[str | os.PathLike[str]]) -> list[dict[str, Any]]:
    """Reads reports that runs wrote; a file may hold one or a list of them.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file holds no report.
    """
    reports: list[dict[str, Any]] = []
    for path in paths:
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not a JSON report ({error}): write one with spdnn --report_out") from None
        for report in content if isinstance(content, list) else [content]:
            if amiss := _amiss(report):
                raise ValueError(
                    f"{path}: holds no report of a run, {amiss} is missing or wrong: write one with spdnn --report_out"
                )
            reports.append(report)
    return reports
