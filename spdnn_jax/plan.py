"""Plan: a network laid out for the native back ends; build, save, load."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import jax
import numpy as np

from spdnn_jax import checks, plan_file, planner
from spdnn_jax._native import core, cuda_unavailable_reason, cuda_workspace_bytes, has_cuda_library, usable_cores
from spdnn_jax.activation import Clip, paired, resolve
from spdnn_jax.chain import Rows
from spdnn_jax.costs import Precision
from spdnn_jax.dense import DenseProducts
from spdnn_jax.layout import PlanTable, clip_of, cut
from spdnn_jax.network import SparseLayer, SparseNetwork, as_layers, native_arrays
from spdnn_jax.plan_file import PlanFile
from spdnn_jax.simplify import COMPRESS, Compress, Simplified

_SUMMARY_LINES = 12  # on compression, at most

_Children = tuple[jax.Array, Rows | None, DenseProducts | None]


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, eq=False)
class Plan:
    """A network laid out for a back end: one array of words, whatever the number of layers.

    A pytree, so that a plan is an ordinary argument of a jitted function: with one leaf, and more where derivatives or
    dense products were asked for, or gain.

    Attributes:
        words: uint32 (words,), the layout that ``cuda_ext/spdnn_layout.h`` defines.
        table: The static records at the head of ``words``.
        kernel: CUDA kernel family to use throughout, or "auto": the planner picks.
        file: Where the words are mapped from, or None.
        rows: What derivatives read, where the plan was built for them.
        dense: Layers that may be dense products of XLA's.
    """

    words: jax.Array
    table: PlanTable
    kernel: planner.Kernel = "auto"
    file: PlanFile | None = None
    rows: Rows | None = None
    dense: DenseProducts | None = None

    @classmethod
    def from_words(cls, words: np.ndarray, kernel: planner.Kernel = "auto") -> "Plan":
        """A plan from its words, on the default device.

        Reads them all once: the back ends trust a plan's indices.

        Args:
            words: uint32 (words,).
            kernel: As in `build_plan`.

        Raises:
            ValueError: The words are no plan of this version, cut short or damaged; the message names the layer.
        """
        table = PlanTable(words)
        if words.size != table.header["words"]:
            raise ValueError(f"the plan holds {words.size} words, its header says {table.header['words']}")
        _check_words(words, table)
        return cls._of_sound_words(words, table, kernel)

    @classmethod
    def _of_sound_words(cls, words: np.ndarray, table: PlanTable, kernel: planner.Kernel) -> "Plan":
        planner.schedule(table, kernel)  # says so now if it cannot be
        return cls(jax.device_put(words), table, kernel)

    def _sound_words(self) -> jax.Array:
        """All of the words; those of a mapped plan are read and checked now, if that was not done before."""
        if self.file is not None and self.file.check(0, self.layers):
            self._check_piece(np.asarray(self.words), self.table)
        return self.words

    def _check_piece(self, words: np.ndarray, table: PlanTable) -> None:
        assert self.file is not None
        try:
            _check_words(words, table)
        except ValueError as error:
            raise self.file.named(error) from None

    def cut(self, first: int, end: int) -> "Plan":
        """Layers first .. end (counted from 0) as a plan of their own, with words on the host: see `layout.cut`.

        Raises:
            ValueError: There are no such layers, or the plan is mapped from a file where they are damaged.
        """
        is_new = self.file is not None and self.file.check(first, min(end, self.layers))
        words: Any = cut(np.asarray(self.words), self.table, first, end)
        table = PlanTable(words)
        if is_new:
            self._check_piece(words, table)
        return Plan(words, table, self.kernel)

    def tree_flatten(self) -> tuple[_Children, tuple[PlanTable, planner.Kernel]]:
        """For JAX: the words are leaves, the rest is static."""
        return (self._sound_words(), self.rows, self.dense), (self.table, self.kernel)

    @classmethod
    def tree_unflatten(cls, static: tuple[PlanTable, planner.Kernel], children: _Children) -> "Plan":
        """For JAX: the reverse of `tree_flatten`."""
        words, rows, dense = children
        return cls(words, *static, rows=rows, dense=dense)

    def with_derivatives(self) -> "Plan":
        """The plan with what a derivative of `infer` reads: its layers once more, in compressed rows, both ways.

        They take 16 bytes an edge, are not saved, and are left out by `split` and the functions that stream.

        Raises:
            ValueError: A layer has 2^31 edges or more.
        """
        return dataclasses.replace(self, rows=Rows.of_plan(self.table, np.asarray(self._sound_words())))

    def with_precision(self, precision: Precision | None) -> "Plan":
        """The plan with the dense weights of layers for which XLA's dense product may be the faster one.

        They are made for the device that this machine runs plans on, take what `summary` says and 4 GiB at most, are
        not saved, and are left out by `split` and the functions that stream: these run on the kernels alone.

        Args:
            precision: As in `build_plan`.

        Raises:
            ValueError: There is no such precision, or one kernel family is to run all layers.
        """
        if precision is None:
            return dataclasses.replace(self, dense=None)
        if self.kernel != "auto":
            raise ValueError(f"kernel={self.kernel!r} runs all layers: with a precision leave it at 'auto'")
        device = "cpu" if cuda_unavailable_reason() else "gpu"
        products = DenseProducts.of_plan(self.table, np.asarray(self._sound_words()), precision, device)
        return dataclasses.replace(self, dense=products)

    def _with_default_precision(self, precision: Precision | None) -> "Plan":
        """As `with_precision`; where one kernel family is to run all layers, float32 asks for nothing."""
        return self if precision == "float32" and self.kernel != "auto" else self.with_precision(precision)

    @property
    def inputs(self) -> int:
        """Number of input neurons."""
        return int(self.table.header["inputs"])

    @property
    def outputs(self) -> int:
        """Number of output neurons, those of the original network."""
        return int(self.table.header["outputs"])

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.table.layers)

    @property
    def activation(self) -> tuple[Clip, ...]:
        """The activation of each layer."""
        return tuple(clip_of(layer) for layer in self.table.layers)

    @property
    def compress(self) -> Compress:
        """Lossless compression that the plan was built with."""
        if self.table.header["merge_features"]:
            return "full"
        return "neurons" if self.table.header["merged_neurons"] else "none"

    @property
    def layer_edges(self) -> np.ndarray:
        """Stored edges of each layer of the original network, int64 (layers,)."""
        return self.table.layers["edges"].copy()

    @property
    def edges(self) -> int:
        """Stored edges of the original network."""
        return int(self.layer_edges.sum())

    @property
    def multiplied_edges(self) -> np.ndarray:
        """Edges of each layer as multiplied, without padding, int64 (layers,): fewer where neurons were merged."""
        return self.table.layers["multiplied_edges"].copy()

    @property
    def nbytes(self) -> int:
        """Size of the plan in bytes."""
        return int(self.table.header["words"]) * 4

    def summary(self, features: int | None = None) -> str:
        """Figures of the plan for people: sizes, what was merged where, and how the outputs stand in row groups.

        Args:
            features: Say, too, what memory a call with so many features takes on a GPU.
        """
        runs = self.table.runs
        outputs = runs["groups"] * runs["group_outputs"]
        stored = int((runs["groups"] * runs["edges"] * runs["group_outputs"]).sum())
        multiplied = int(self.multiplied_edges.sum())
        groups = ", ".join(
            f"{size}: {100 * outputs[runs['group_outputs'] == size].sum() / max(outputs.sum(), 1):.1f}%"
            for size in np.unique(runs["group_outputs"])[::-1]
        )
        return "\n".join(
            [
                f"plan of {self.layers} layers, {self.inputs} -> {self.outputs} neurons, "
                f"{self.edges:,} edges, {self.nbytes / 2**20:,.1f} MiB, "
                f"{self.nbytes / self._csr_nbytes():.2f} times what the network takes in CSR",
                *self._summary_of_compression(),
                f"outputs by size of their row group: {groups}",
                f"edges with padding: {stored:,} ({100 * (stored / max(multiplied, 1) - 1):.1f}% more than without), "
                f"{100 * (runs['value_offset'] < 0).mean():.1f}% of the runs hold no values, one weight serves them",
                f"on CUDA: {planner.schedule(self.table, self.kernel).reason}",
                *([] if self.dense is None else [self._summary_of_dense(self.dense)]),
                *([] if features is None else [self._summary_of_memory(features)]),
            ]
        )

    def _summary_of_dense(self, dense: DenseProducts) -> str:
        if not dense.layers:
            return dense.summary(self.table)
        return (
            f"{dense.summary(self.table)}; their weights take {dense.nbytes / 2**20:,.1f} MiB beside the plan, "
            f"together {(self.nbytes + dense.nbytes) / self._csr_nbytes():.2f} times the CSR: precision=None leaves "
            "them out"
        )

    def _csr_nbytes(self) -> int:
        """What the original network takes in compressed rows: index and value an edge, pointer a row, all 32-bit."""
        outputs = sum(self.table.layers[name].sum() for name in ("outputs", "merged", "constant", "unread"))
        return 4 * int(2 * self.edges + outputs + self.layers)

    def _summary_of_memory(self, features: int) -> str:
        if not has_cuda_library():
            return "device memory: not known, spdnn_jax was installed without CUDA"
        parts = {
            "plan": self.nbytes,
            **({"dense weights": self.dense.nbytes} if self.dense is not None and self.dense.layers else {}),
            "input as bytes": features * self.inputs,
            "workspace": cuda_workspace_bytes(self.table.records, features),
        }
        listed = ", ".join(f"{size / 2**20:,.1f} MiB of {name}" for name, size in parts.items())
        return f"device memory for {features:,} features: {sum(parts.values()) / 2**20:,.1f} MiB ({listed})"

    def split(self, layers: int) -> Iterator["Plan"]:
        """Cuts the plan into plans of so many layers, the last one perhaps of fewer, made as they are asked for.

        Run one after the other, each on the activations of the one before, they compute what the whole plan does. The
        neurons between them stand in an order of the plan's own.

        Args:
            layers: Layers of a part.

        Raises:
            ValueError: layers is not positive.
        """
        layers = checks.count("the layers of a part", layers, lowest=1)
        parts = (self.cut(first, min(first + layers, self.layers)) for first in range(0, self.layers, layers))
        return (Plan._of_sound_words(np.asarray(part.words), part.table, part.kernel) for part in parts)

    def _summary_of_compression(self) -> list[str]:
        """One line in all, then one for each stretch of layers with the same neurons left."""
        if self.compress == "none":
            return []
        edges = self.multiplied_edges
        figures = np.stack([self.table.layers[name] for name in ("outputs", "merged", "constant", "unread")], axis=1)
        starts = [k for k in range(self.layers) if k == 0 or (figures[k] != figures[k - 1]).any()]
        lines = [
            f"compress={self.compress}: {edges.sum():,} edges to multiply, "
            f"{100 * edges.sum() / max(self.edges, 1):.1f}% of the original network's"
        ]
        for first, end in zip(starts, [*starts[1:], self.layers], strict=True):
            left, merged, constant, unread = (int(figure) for figure in figures[first])
            where = f"layer {first + 1}" if end == first + 1 else f"layers {first + 1} to {end}"
            lines.append(
                f"  {where}: {left:,} of {left + merged + constant + unread:,} outputs left ({merged:,} merged, "
                f"{constant:,} constant, {unread:,} unread), {edges[first:end].sum():,} edges"
            )
        if len(lines) > _SUMMARY_LINES:
            lines[_SUMMARY_LINES - 1 :] = [f"  and {len(lines) - _SUMMARY_LINES + 1} stretches of layers more"]
        return lines

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the plan to a safetensors file.

        Raises:
            OSError: The file cannot be written; nothing is left behind.
        """
        plan_file.save(path, np.asarray(self._sound_words()), self.table)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], kernel: planner.Kernel = "auto", precision: Precision | None = "float32"
    ) -> "Plan":
        """Reads a plan that `save` wrote.

        Args:
            path: The file.
            kernel: As in `build_plan`.
            precision: As in `build_plan`: a file does not hold it, nor dense weights.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no plan of this version, or a damaged one; the message names file and layer.
        """
        file = PlanFile(path)
        file.check(0, len(file.table.layers))
        try:
            plan = cls.from_words(np.array(file.words), kernel)
        except ValueError as error:
            raise file.named(error) from None
        return plan._with_default_precision(precision)

    @classmethod
    def open(cls, path: str | os.PathLike[str], kernel: planner.Kernel = "auto") -> "Plan":
        """Maps a plan that `save` wrote into memory, to be streamed (`pieces.stream`): only what is used is read.

        A layer is compared with its checksum when it is first used.

        Args:
            path: The file.
            kernel: As in `build_plan`.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no plan of this version, or its records are damaged; the message names the file.
        """
        file = PlanFile(path)
        words: Any = file.words
        return cls(words, file.table, kernel, file)


def as_plan(given: Any) -> Plan:
    """A plan, looked at.

    Raises:
        ValueError: It is none, or was rebuilt without its words; the message says what to call.
    """
    if isinstance(given, Plan):
        checks.array("the plan's words", given.words)
        return given
    cure = "call build_plan on it first, once, and pass what it returns"
    if isinstance(given, SparseLayer):
        cure = "call build_plan([layer]) first, once, or use spdnn_jax.layer"
    elif not isinstance(given, SparseNetwork):
        cure = "the plan comes first, from build_plan, then the features"
    raise ValueError(f"a Plan is expected, got {checks.kind_of(given)}: {cure}")


def _check_words(words: np.ndarray, table: PlanTable) -> None:
    """Raises ValueError, with the layer, where a plan that comes from outside does not hold what back ends rely on."""
    try:
        core.check_plan(table.records, np.ascontiguousarray(words))
    except ValueError as error:
        raise ValueError(f"the plan is damaged: {error}: build it again") from None


def build_plan(
    network: SparseNetwork | Iterable[SparseLayer],
    *,
    activation: Clip | Iterable[Clip] | None = None,
    cap: float | EllipsisType | None = ...,
    compress: Compress = "none",
    kernel: planner.Kernel = "auto",
    precision: Precision | None = "float32",
    derivatives: bool = False,
    threads: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Lays out a network for the native back ends (arXiv 2007.14152, section III.B, with row groups).

    Takes layers one by one, in native code over all cores, and keeps no more than `threads` of them beside the plan:
    an iterator that reads or generates layers never holds the whole network. Compression holds the simplified network,
    too, until it is laid out.

    Args:
        network: A network, or its layers in order. A SciPy matrix (inputs, outputs) is taken as a layer without bias.
        activation: One for all layers, or one a layer; by default the challenge's ``Clip.relu(32)``. Only for an
            iterable; a `SparseNetwork` has its own.
        cap: Short for ``activation=Clip.relu(cap)``.
        compress: "none"; "neurons": lay out the network that `simplify` makes of this one; "full": let the back end
            merge equal features, too, while it runs. Outputs stay the same, to float32 rounding. Active counts are of
            the neurons that are left: a feature is not counted where only dropped or constant ones are not zero.
        kernel: CUDA kernel family to use throughout; by default the planner picks one for each layer. Wide layers whose
            outputs share nothing run `staged` on a GPU only if the plan was built on a machine with one, or with
            ``kernel="staged"``: what that family reads doubles the plan, and no CPU reads it. Where "auto" finds that
            XLA's dense product is the faster one for a layer and the features of a call, by an estimate from measured
            figures, that runs; `Plan.summary` says where.
        precision: What the inputs of dense products may be rounded to, activations and weights alike; sums are float32.
            "float32": nothing is rounded. "tf32", "bfloat16": on a GPU, to 11 or 8 bits of significand
            (docs/numerics.md); on a CPU they are float32. None: no dense products, nor their weights. The kernels round
            nothing.
        derivatives: Whether `infer` is to be differentiated in the features: see `Plan.with_derivatives`.
        threads: Layers worked on at a time; by default, the cores this process may use.
        progress: Called after each layer with the number of layers taken so far.

    Returns:
        The plan, on the default device.

    Raises:
        ValueError: A layer is none, is malformed, or does not fit the one before it; the message names the layer. Or
            the activations are not as many as the layers, or there is no such compression, kernel or precision.
    """
    if isinstance(network, Plan):
        raise ValueError("build_plan takes a network, got a Plan, which is built already")
    if not isinstance(network, SparseNetwork):
        layers = paired(as_layers(network), resolve(activation, cap))
    elif activation is None and cap is ...:
        layers = paired(network.layers, network.activation)
    else:
        raise ValueError(
            "a SparseNetwork has its own activations: build another one, SparseNetwork(layers, activation)"
        )
    if compress not in COMPRESS:
        raise ValueError(f"compress must be one of {', '.join(COMPRESS)}; got {compress!r}")
    threads = usable_cores() if threads is None else checks.count("threads", threads, lowest=1)
    words = _lay_out(layers, compress, kernel, threads, progress)
    plan = Plan._of_sound_words(words, PlanTable(words), kernel)._with_default_precision(precision)
    return plan.with_derivatives() if derivatives else plan


def _lay_out(
    layers: Iterator[tuple[SparseLayer, Clip]],
    compress: Compress,
    kernel: planner.Kernel,
    threads: int,
    progress: Callable[[int], None] | None,
) -> np.ndarray:
    rule = planner.layout_rule(kernel, for_gpu=cuda_unavailable_reason() is None)
    builder = core.PlanBuilder(
        threads=threads,
        staged_below=rule.staged_below,
        staged_wider_than=rule.staged_wider_than,
        single_below=rule.single_below,
    )
    if compress == "none":
        for count, (layer, clip) in enumerate(layers, start=1):
            builder.add(**native_arrays(layer, clip, count))
            if progress is not None:
                progress(count)
        return builder.finish()
    simplified = Simplified(layers, threads=threads, progress=progress)
    for number, (layer, clip, origin) in enumerate(simplified, start=1):
        builder.add(**native_arrays(layer, clip, number), origin=origin)
    return builder.finish(expansion=simplified.expansion.outputs, merge_features=compress == "full")
