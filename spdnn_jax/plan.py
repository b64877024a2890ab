"""Plan: a network laid out for the native back ends; build, save, load."""

import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from spdnn_jax import planner
from spdnn_jax._extras import require
from spdnn_jax._native import core
from spdnn_jax.layout import PlanTable
from spdnn_jax.network import SparseLayer, SparseNetwork, check_cap

_LARGEST_HEADER = 1 << 20  # bytes: a plan's file has one entry, any more is another's


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Plan:
    """A network laid out for a back end: one array of words, whatever the number of layers.

    A pytree with one leaf, so that a plan is an ordinary argument of a jitted function.

    Attributes:
        words: uint32 (words,), the layout that ``cuda_ext/spdnn_layout.h`` defines.
        table: The static records at the head of ``words``.
        kernel: CUDA kernel family to use throughout, or "auto": the planner picks.
    """

    words: jax.Array
    table: PlanTable
    kernel: planner.Kernel = "auto"

    @classmethod
    def from_words(cls, words: np.ndarray, kernel: planner.Kernel = "auto") -> "Plan":
        """A plan from its words, on the default device.

        Args:
            words: uint32 (words,).
            kernel: As in `build_plan`.

        Raises:
            ValueError: The words are no plan of this version, or cut short.
        """
        table = PlanTable(words)
        if words.size != table.header["words"]:
            raise ValueError(f"the plan holds {words.size} words, its header says {table.header['words']}")
        planner.schedule(table, kernel)  # says so now if it cannot be
        return cls(jax.device_put(words), table, kernel)

    def tree_flatten(self) -> tuple[tuple[jax.Array], tuple[PlanTable, planner.Kernel]]:
        """For JAX: the words are a leaf, the rest is static."""
        return (self.words,), (self.table, self.kernel)

    @classmethod
    def tree_unflatten(cls, static: tuple[PlanTable, planner.Kernel], leaves: tuple[jax.Array]) -> "Plan":
        """For JAX: the reverse of `tree_flatten`."""
        return cls(leaves[0], *static)

    @property
    def inputs(self) -> int:
        """Number of input neurons."""
        return int(self.table.header["inputs"])

    @property
    def outputs(self) -> int:
        """Number of output neurons."""
        return int(self.table.header["outputs"])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.table.layers)

    @property
    def cap(self) -> float | None:
        """Upper clip of every layer, or None."""
        cap = float(self.table.header["cap"])
        return None if np.isinf(cap) else cap

    @property
    def layer_edges(self) -> np.ndarray:
        """Stored edges of each layer of the original network, int64 (layers,)."""
        return self.table.layers["edges"].copy()

    @property
    def edges(self) -> int:
        """Stored edges of the original network."""
        return int(self.layer_edges.sum())

    @property
    def nbytes(self) -> int:
        """Size of the plan in bytes."""
        return int(self.table.header["words"]) * 4

    def summary(self) -> str:
        """Figures of the plan for people: sizes, and how the outputs stand in row groups."""
        runs = self.table.runs
        outputs = runs["groups"] * runs["group_outputs"]
        stored = int((runs["groups"] * runs["edges"] * runs["group_outputs"]).sum())
        groups = ", ".join(
            f"{size}: {100 * outputs[runs['group_outputs'] == size].sum() / max(outputs.sum(), 1):.1f}%"
            for size in np.unique(runs["group_outputs"])[::-1]
        )
        return "\n".join(
            [
                f"plan of {self.layers} layers, {self.inputs} -> {self.outputs} neurons, "
                f"{self.edges:,} edges, {self.nbytes / 2**20:,.1f} MiB",
                f"outputs by size of their row group: {groups}",
                f"edges with padding: {stored:,} ({100 * (stored / max(self.edges, 1) - 1):.1f}% more than stored), "
                f"{100 * (runs['value_offset'] < 0).mean():.1f}% of the runs hold no values, one weight serves them",
                f"on CUDA: {planner.schedule(self.table, self.kernel).reason}",
            ]
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a safetensors file.

        Raises:
            OSError: The file cannot be written; nothing is left behind.
        """
        safetensors = require("safetensors.numpy", extra="data", purpose="saving a plan")
        target = Path(path)
        partial = target.with_name(target.name + ".part")
        try:
            safetensors.save_file({"words": np.asarray(self.words)}, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Plan":
        """Reads a plan that `save` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no plan of this version.
        """
        safetensors = require("safetensors", extra="data", purpose="loading a plan")
        try:
            with safetensors.safe_open(str(path), framework="numpy") as file:
                words = file.get_tensor("words")
        except safetensors.SafetensorError as error:
            raise ValueError(f"{os.fspath(path)}: not a plan file ({error})") from None
        return cls.from_words(words)

    @classmethod
    def open(cls, path: str | os.PathLike[str], kernel: planner.Kernel = "auto") -> "Plan":
        """Maps a plan that `save` wrote into memory, to be streamed (`pieces.stream`): only what is used is read.

        Args:
            path: The file.
            kernel: As in `build_plan`.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no plan of this version.
        """
        target = Path(path)
        with target.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            try:
                entry = json.loads(file.read(min(header_bytes, _LARGEST_HEADER)))["words"]
                begin, end = entry["data_offsets"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{target}: not a plan file: write one with Plan.save") from None
        data = 8 + header_bytes
        if entry["dtype"] != "U32" or target.stat().st_size < data + end:
            raise ValueError(f"{target}: not a plan file, or cut short: write it again with Plan.save")
        words: Any = np.memmap(target, np.uint32, "r", data + begin, ((end - begin) // 4,))
        return cls(words, PlanTable(words), kernel)


def build_plan(
    network: SparseNetwork | Iterable[SparseLayer],
    *,
    cap: float | None = 32.0,
    kernel: planner.Kernel = "auto",
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Lays out a network for the native back ends (arXiv 2007.14152, section III.B, with row groups).

    Takes layers one by one, in native code over all cores, and keeps no more than `threads` of them beside the plan:
    an iterator that reads or generates layers never holds the whole network.

    Args:
        network: A network, or its layers in order.
        cap: Upper clip of every layer, None for none. Only for an iterable; a `SparseNetwork` has its own.
        kernel: CUDA kernel family to use throughout; by default the planner picks one for each layer.
        threads: Layers worked on at a time; by default, the cores this process may use.
        progress: Called after each layer with the number of layers taken so far.

    Returns:
        The plan, on the default device.

    Raises:
        ValueError: A layer is malformed, or does not fit the one before it; the message names the layer.
    """
    if isinstance(network, SparseNetwork):
        layers, cap = iter(network.layers), network.cap
    else:
        layers = iter(network)
    check_cap(cap)
    builder = core.PlanBuilder(cap=np.inf if cap is None else cap, threads=threads or _usable_cores())
    for count, layer in enumerate(layers, start=1):
        builder.add(
            inputs=layer.inputs,
            indptr=np.ascontiguousarray(layer.indptr, np.int64),
            indices=np.ascontiguousarray(layer.indices, np.int32),
            values=np.ascontiguousarray(layer.values, np.float32).reshape(-1),
            bias=np.ascontiguousarray(layer.bias, np.float32).reshape(-1),
        )
        if progress is not None:
            progress(count)
    return Plan.from_words(builder.finish(), kernel)


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
