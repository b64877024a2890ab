"""The layout of a plan as Python sees it: the records that ``cuda_ext/spdnn_layout.h`` defines, and their decoding."""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spdnn_jax._native import core
from spdnn_jax.activation import Clip

HEADER = np.dtype([tuple(field) for field in core.header_fields()])
LAYER = np.dtype([tuple(field) for field in core.layer_fields()])
RUN = np.dtype([tuple(field) for field in core.run_fields()])

_WORD = 4  # bytes

# Fields of a layer's record that do not change how it is computed.
_NOT_SHAPE = (
    *("first_run", "first_word", "next_words", "prunable"),
    *("edges", "multiplied_edges", "merged", "constant", "unread"),
    *("staged_offset", "stage_offset", "stages", "staged_single_valued", "staged_value"),
)


class PlanTable:
    """The records at the head of a plan: its static part, hashable, so that jit can key its cache by it."""

    def __init__(self, words: np.ndarray) -> None:
        """Reads the records.

        Args:
            words: uint32 (words,), a plan or at least its records.

        Raises:
            ValueError: The words are no plan, or one of another version.
        """
        header_words = HEADER.itemsize // _WORD
        if words.dtype != np.uint32 or words.ndim != 1 or words.size < header_words:
            raise ValueError("not a plan: expected a vector of 32-bit words that begins with a plan's header")
        self.header = words[:header_words].copy().view(HEADER)[0]
        if self.header["version"] != core.PLAN_VERSION:
            raise ValueError(
                f"the plan has version {self.header['version']}, this package reads version {core.PLAN_VERSION}: "
                "build the plan again"
            )
        if self.header["layers"] < 1 or self.header["runs"] < 0:
            raise ValueError("the plan is damaged: its header announces no layers")
        layer_words = int(self.header["layers"]) * LAYER.itemsize // _WORD
        run_words = int(self.header["runs"]) * RUN.itemsize // _WORD
        table = words[: header_words + layer_words + run_words].copy()
        if table.size < header_words + layer_words + run_words:
            raise ValueError("the plan is cut short inside its records")
        self.layers = table[header_words : header_words + layer_words].view(LAYER)
        self.runs = table[header_words + layer_words :].view(RUN)
        self.records = table.view(np.int64)
        self._digest = hashlib.sha256(table.tobytes()).digest()

    def __hash__(self) -> int:
        return hash(self._digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTable) and self._digest == other._digest

    def __repr__(self) -> str:
        return f"PlanTable({self.header['layers']} layers, {self.header['words']} words)"

    def runs_of(self, layer: int) -> np.ndarray:
        """The run records of a layer (counted from 0)."""
        record = self.layers[layer]
        return self.runs[record["first_run"] : record["first_run"] + record["runs"]]


def clip_of(layer: np.void) -> Clip:
    """The activation that a layer's record holds."""
    return Clip(float(layer["lower"]), float(layer["upper"]))


@dataclass(frozen=True)
class LayerShape:
    """All of a layer's records but its offsets: layers of one shape can share one traced body.

    Attributes:
        layer: The layer's record, offsets zeroed, as bytes.
        runs: Its runs' records, offsets zeroed, as bytes.
    """

    layer: bytes
    runs: bytes


def layer_shape(table: PlanTable, layer: int) -> LayerShape:
    """The shape of a layer (counted from 0)."""
    record, runs = table.layers[layer].copy(), table.runs_of(layer).copy()
    for name in _NOT_SHAPE:
        record[name] = 0
    record["bias_offset"] = min(record["bias_offset"], 0)
    runs["index_offset"] = 0
    runs["value_offset"] = np.minimum(runs["value_offset"], 0)
    return LayerShape(record.tobytes(), runs.tobytes())


def layer_offsets(table: PlanTable, layer: int) -> np.ndarray:
    """The offsets of a layer's sections, int64 (1 + 2 * runs,): bias, then index and value offset of each run."""
    runs = table.runs_of(layer)
    sections = np.stack([runs["index_offset"], runs["value_offset"]], axis=1).reshape(-1)
    return np.concatenate([table.layers[layer]["bias_offset"][None], sections]).astype(np.int64)


def cut(words: Any, table: PlanTable, first: int, end: int) -> Any:
    """Layers first .. end of a plan (counted from 0) as a plan of their own.

    Neurons between layers stand in slot order, and so they do at the cuts: the result of one part is the input of the
    next, and only the last part restores the original order.

    Args:
        words: uint32 (words,), the whole plan, on the host or traced; it may be mapped from a file: no other layers are
            read.
        table: Its records.
        first: The first layer.
        end: The layer after the last.

    Returns:
        uint32 (words,), the part, on the host or traced. Parts of layers with equal records have equal records
        themselves.

    Raises:
        ValueError: There are no such layers.
    """
    head = _records_of_part(table, first, end)
    outputs = int(table.header["outputs"] if end == len(table.layers) else table.layers["outputs"][end - 1])
    slots: Any = np.arange(outputs, dtype=np.uint32)
    if end == len(table.layers):
        slots = words[int(table.header["slot_offset"]) : int(table.header["slot_offset"]) + outputs]
    begin, last = int(table.layers["first_word"][first]), table.layers[end - 1]
    sections = words[begin : int(last["first_word"] + last["words"])]
    padding = np.zeros(-outputs % core.WORD_ALIGNMENT, np.uint32)
    concatenate: Any = np.concatenate if isinstance(words, np.ndarray) else jnp.concatenate
    return concatenate([head, sections, slots, padding])


def cut_table(table: PlanTable, first: int, end: int) -> PlanTable:
    """The records of a part that `cut` makes, without its words."""
    return PlanTable(_records_of_part(table, first, end))


def _records_of_part(table: PlanTable, first: int, end: int) -> np.ndarray:
    """What stands before the sections of a part: uint32, padded as these begin."""
    count = len(table.layers)
    if not 0 <= first < end <= count:
        raise ValueError(f"layers {first} .. {end} are no stretch of a plan of {count} layers")
    header, layers = table.header.copy(), table.layers[first:end].copy()
    first_run, last = int(layers["first_run"][0]), layers[-1]
    runs = table.runs[first_run : last["first_run"] + last["runs"]].copy()
    begin, stop = int(layers["first_word"][0]), int(last["first_word"] + last["words"])
    table_words = (HEADER.itemsize + layers.nbytes + runs.nbytes) // _WORD
    padded = -(-table_words // core.WORD_ALIGNMENT) * core.WORD_ALIGNMENT
    moved = padded - begin
    header["layers"], header["runs"] = len(layers), len(runs)
    header["inputs"] = layers["inputs"][0]
    if end < count:
        header["outputs"] = last["outputs"]
    header["slot_offset"] = stop + moved
    header["words"] = header["slot_offset"] + -(-header["outputs"] // core.WORD_ALIGNMENT) * core.WORD_ALIGNMENT
    layers["first_run"] -= first_run
    layers["next_words"][-1] = 0
    moving = [layers[name] for name in ("first_word", "bias_offset", "staged_offset", "stage_offset")]
    for offsets in (*moving, runs["index_offset"], runs["value_offset"]):
        offsets[offsets >= 0] += moved
    records = np.zeros(padded, np.uint32)
    records[:table_words] = np.concatenate([np.atleast_1d(array).view(np.uint32) for array in (header, layers, runs)])
    return records


def _section(words: jax.Array, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(words, offset, size)


def _by_group(elements: jax.Array, groups: int, edges: int, trailing: tuple[int, ...]) -> jax.Array:
    """Reorders a section's elements from slices of interleaved groups to (groups, edges, *trailing)."""
    chunks, chunk, width = edges // core.EDGE_CHUNK, core.EDGE_CHUNK, core.SLICE_GROUPS
    whole = groups // width * width
    per_group = edges * int(np.prod(trailing, dtype=np.int64))
    parts = []
    for first, count, slice_width in ((0, whole, width), (whole, groups - whole, groups - whole)):
        if count:
            part = elements[first * per_group : (first + count) * per_group]
            part = part.reshape(count // slice_width, chunks, slice_width, chunk, *trailing)
            parts.append(jnp.swapaxes(part, 1, 2).reshape(count, edges, *trailing))
    return jnp.concatenate(parts)


def run_indices(words: jax.Array, run: np.void, index_bits: int, offset: jax.Array) -> jax.Array:
    """Input slots of a run's groups, int32 (groups, edges)."""
    groups, edges = int(run["groups"]), int(run["edges"])
    section = _section(words, offset, -(-groups * edges * index_bits // 32))
    if index_bits == 16:
        section = jax.lax.bitcast_convert_type(section, jnp.uint16).reshape(-1)
    return _by_group(section.astype(jnp.int32), groups, edges, ())


def run_values(words: jax.Array, run: np.void, offset: jax.Array) -> jax.Array:
    """Stored values of a run, float32 (groups, edges, outputs of a group)."""
    groups, edges, outputs = int(run["groups"]), int(run["edges"]), int(run["group_outputs"])
    section = _section(words, offset, groups * edges * outputs)
    return _by_group(jax.lax.bitcast_convert_type(section, jnp.float32), groups, edges, (outputs,))


def to_slot_order(sums: jax.Array, run: np.void) -> jax.Array:
    """Reorders a run's results from (features, groups, outputs of a group) to (features, slots)."""
    groups, outputs, width = int(run["groups"]), int(run["group_outputs"]), core.SLICE_GROUPS
    whole = groups // width * width
    parts = []
    for first, count, slice_width in ((0, whole, width), (whole, groups - whole, groups - whole)):
        if count:
            part = sums[:, first : first + count].reshape(-1, count // slice_width, slice_width, outputs)
            parts.append(jnp.swapaxes(part, 2, 3).reshape(-1, count * outputs))
    return jnp.concatenate(parts, axis=1)


def layer_bias(words: jax.Array, layer: np.void, offset: jax.Array) -> jax.Array:
    """Bias of a layer in slot order, float32 (outputs,), or () where all outputs share one."""
    if layer["bias_offset"] < 0:
        return jnp.float32(layer["bias"])
    return jax.lax.bitcast_convert_type(_section(words, offset, int(layer["outputs"])), jnp.float32)


@functools.cache
def stretches(table: PlanTable) -> tuple[tuple[int, int], ...]:
    """Stretches (first, end) of consecutive layers of one width, inputs and outputs, which one traced loop can run.

    A layer whose width changes is a stretch of its own.
    """
    widths = [(int(layer["inputs"]), int(layer["outputs"])) for layer in table.layers]
    starts = [k for k, width in enumerate(widths) if k == 0 or width != widths[k - 1] or width[0] != width[1]]
    return tuple(zip(starts, [*starts[1:], len(widths)], strict=True))
