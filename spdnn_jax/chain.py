"""The derivative of `infer` in the features: a network forward, and both ways through its derivative, in one call.

A plan that was built for derivatives has its layers in compressed rows, too (``cuda_ext/layout/spdnn_layout.h``).
`chain_p` runs them and keeps, of each feature and layer, one bit an output: whether the sum lay inside the activation's
bounds. Given these masks the derivative is linear; `chain_derivative_p` is that linear map, or its transpose.

However many layers there are, and however different, each is one custom call; in plain XLA, one loop with one body.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from spdnn_jax import _native, rules
from spdnn_jax._native import CHAIN_DERIVATIVE_TARGET, CHAIN_TARGET, core
from spdnn_jax.activation import clipped
from spdnn_jax.layout import PlanTable

_LAYER = np.dtype([tuple(field) for field in core.rows_fields()])
_BITS = core.MASK_BITS
_POSITIONS = np.arange(_BITS, dtype=np.uint32)[None, None]


class RowsTable:
    """The records of a plan's rows: their static part, hashable."""

    def __init__(self, records: np.ndarray) -> None:
        self.records = records
        self.layers = records.view(_LAYER)
        self._bytes = records.tobytes()

    def __hash__(self) -> int:
        return hash(self._bytes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RowsTable) and self._bytes == other._bytes

    def __repr__(self) -> str:
        return f"RowsTable({len(self.layers)} layers)"

    @property
    def inputs(self) -> int:
        """Number of input neurons."""
        return int(self.layers["inputs"][0])

    @property
    def outputs(self) -> int:
        """Number of output neurons."""
        return int(self.layers["outputs"][-1])

    @property
    def mask_words(self) -> int:
        """Words that a feature's masks take, all layers together."""
        return int(self.layers["mask_words"].sum())

    def work_to_count(self, features: int, words: jax.Array) -> list[jax.Array]:
        """See `rules.work_to_count`."""
        return rules.work_to_count(words[0], features * float(self.layers["edges"].sum()))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["words"], meta_fields=["table"])
@dataclass(frozen=True, eq=False)
class Rows:
    """A plan's layers in compressed rows, by output and by input.

    Attributes:
        words: uint32 (words,).
        table: Where in them a layer's arrays are.
    """

    words: jax.Array
    table: RowsTable

    @classmethod
    def of_plan(cls, table: PlanTable, words: np.ndarray) -> "Rows":
        """The rows of a plan, on the default device.

        Args:
            table: The plan's records.
            words: uint32, the plan, on the host.

        Raises:
            ValueError: A layer has 2^31 edges or more.
        """
        records, rows = core.build_rows(table.records, np.ascontiguousarray(words))
        return cls(jax.device_put(rows), RowsTable(records))


# --- plain XLA --------------------------------------------------------------------------------------------------------


class _Loop:
    """All layers in one loop: every section is read at the size of the largest, and what is too much counts nothing."""

    def __init__(self, words: jax.Array, table: RowsTable) -> None:
        layers = table.layers
        self.width = int(max(layers["inputs"].max(), layers["outputs"].max(), 1))
        self.edges = int(max(layers["edges"].max(), 1))
        self.mask_words = -(-self.width // _BITS)
        self.fields = {
            name: jnp.asarray(layers[name].astype(np.float32 if layers[name].dtype == np.float64 else np.int32))
            for name in _LAYER.names or ()
        }
        self._words = jnp.pad(words, (0, self.width + self.edges + 1))

    def ints(self, offset: jax.Array, size: int) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(self._words, offset, size), jnp.int32)

    def floats(self, offset: jax.Array, size: int) -> jax.Array:
        return jax.lax.bitcast_convert_type(jax.lax.dynamic_slice_in_dim(self._words, offset, size), jnp.float32)

    def multiply(self, y: jax.Array, layer: dict[str, jax.Array], *, transposed: bool = False) -> jax.Array:
        """(features, width) -> (features, width)."""
        names = ("column_offset", "output_offset", "weight_offset", "inputs")
        if not transposed:
            names = ("row_offset", "index_offset", "value_offset", "outputs")
        starts_at, indices_at, values_at, rows = (layer[name] for name in names)
        starts = self.ints(starts_at, self.width + 1)
        starts = jnp.where(jnp.arange(self.width + 1) <= rows, starts, layer["edges"])
        edge = jnp.arange(self.edges, dtype=jnp.int32)
        exists = edge < layer["edges"]
        row = jnp.searchsorted(starts, edge, side="right").astype(jnp.int32) - 1
        indices = jnp.where(exists, self.ints(indices_at, self.edges), 0)
        values = jnp.where(exists, self.floats(values_at, self.edges), jnp.float32(0))
        products = (jnp.where(exists[None], y[:, indices], jnp.float32(0)) * values[None]).T
        return jax.ops.segment_sum(products, row, num_segments=self.width, indices_are_sorted=True).T

    def forward(self, y: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Activations of the next layer, and their bits, uint32 (features, mask words)."""
        sums = self.multiply(y, layer) + self.floats(layer["bias_offset"], self.width)[None]
        exists = (jnp.arange(self.width) < layer["outputs"])[None]
        y = jnp.where(exists, clipped(sums, layer["lower"], layer["upper"]), jnp.float32(0))
        inside = exists & (y > layer["lower"]) & (y < layer["upper"])
        bits = jnp.pad(inside, ((0, 0), (0, self.mask_words * _BITS - self.width)))
        bits = bits.reshape(y.shape[0], self.mask_words, _BITS).astype(jnp.uint32)
        return y, jnp.sum(bits << _POSITIONS, axis=2, dtype=jnp.uint32)

    def masked(self, y: jax.Array, masks: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
        words = jax.lax.dynamic_slice_in_dim(masks, layer["mask_word"], self.mask_words, axis=1)
        bits = (words[:, :, None] >> _POSITIONS) & jnp.uint32(1)
        inside = bits.reshape(y.shape[0], self.mask_words * _BITS)[:, : self.width] != 0
        return jnp.where(inside | (layer["mask_words"] == 0), y, jnp.float32(0))

    def padded(self, y: jax.Array) -> jax.Array:
        return jnp.pad(y, ((0, 0), (0, self.width - y.shape[1])))


def _chain_xla(y0: jax.Array, words: jax.Array, *, table: RowsTable) -> list[jax.Array]:
    loop = _Loop(words, table)
    y, bits = jax.lax.scan(loop.forward, loop.padded(y0), loop.fields)
    layers = enumerate(table.layers)
    masks = [bits[number, :, : int(layer["mask_words"])] for number, layer in layers if layer["mask_words"]]
    empty = jnp.zeros((y0.shape[0], 0), jnp.uint32)
    return [y[:, : table.outputs], jnp.concatenate([empty, *masks], axis=1)]


def _chain_derivative_xla(
    y: jax.Array, masks: jax.Array, words: jax.Array, *, table: RowsTable, transposed: bool
) -> list[jax.Array]:
    loop = _Loop(words, table)
    masks = jnp.pad(masks, ((0, 0), (0, loop.mask_words)))

    def step(y: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        if transposed:
            return loop.multiply(loop.masked(y, masks, layer), layer, transposed=True), None
        return loop.masked(loop.multiply(y, layer), masks, layer), None

    y = jax.lax.scan(step, loop.padded(y), loop.fields, reverse=transposed)[0]
    return [y[:, : table.inputs if transposed else table.outputs]]


# --- the primitives ---------------------------------------------------------------------------------------------------


def _chain_abstract(y0: Any, words: Any, *, table: RowsTable) -> list[Any]:
    del words
    rules.check_features_whole(y0)
    leading = y0.shape[:-1]
    return [
        y0.update(shape=(*leading, table.outputs)),
        y0.update(shape=(*leading, table.mask_words), dtype=jnp.dtype("uint32")),
    ]


def _derivative_abstract(y: Any, masks: Any, words: Any, *, table: RowsTable, transposed: bool) -> list[Any]:
    del words
    rules.check_features_whole(y, masks)
    return [y.update(shape=(*y.shape[:-1], table.inputs if transposed else table.outputs))]


def _call_chain(y0: jax.Array, words: jax.Array, *, table: RowsTable, cuda: bool = False) -> Sequence[jax.Array]:
    features = y0.shape[0]
    results = [
        jax.ShapeDtypeStruct((features, table.outputs), jnp.float32),
        jax.ShapeDtypeStruct((features, table.mask_words), jnp.uint32),
        *([_workspace(features, words, table)] if cuda else []),
    ]
    counted = [] if cuda else table.work_to_count(features, words)
    return jax.ffi.ffi_call(CHAIN_TARGET, results)(y0, words, *counted, table=table.records)[:2]


def _call_derivative(
    y: jax.Array, masks: jax.Array, words: jax.Array, *, table: RowsTable, transposed: bool, cuda: bool = False
) -> Sequence[jax.Array]:
    features = y.shape[0]
    results = [
        jax.ShapeDtypeStruct((features, table.inputs if transposed else table.outputs), jnp.float32),
        *([_workspace(features, words, table)] if cuda else []),
    ]
    call = jax.ffi.ffi_call(CHAIN_DERIVATIVE_TARGET, results)
    counted = [] if cuda else table.work_to_count(features, words)
    return call(y, masks, words, *counted, table=table.records, transposed=transposed)[:1]


def _workspace(features: int, words: jax.Array, table: RowsTable) -> jax.ShapeDtypeStruct:
    size = _native.cuda_chain_workspace_bytes(table.records, words.shape[0], features)
    return jax.ShapeDtypeStruct((size,), jnp.uint8)


chain_p = rules.define(rules.Kernel("spdnn_chain", _chain_xla, rules.native(_call_chain)), _chain_abstract)
chain_derivative_p = rules.define(
    rules.Kernel("spdnn_chain_derivative", _chain_derivative_xla, rules.native(_call_derivative), features=(0, 1)),
    _derivative_abstract,
)


def _chain_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, table: RowsTable) -> tuple[Any, Any]:
    y0, words = primals
    y, masks = chain_p.bind(y0, words, table=table)
    if isinstance(tangents[0], ad.Zero):
        return [y, masks], [rules.zero_tangent(y), rules.zero_tangent(masks)]
    tangent = chain_derivative_p.bind(tangents[0], masks, words, table=table, transposed=False)[0]
    return [y, masks], [tangent, rules.zero_tangent(masks)]


def _derivative_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    (y,) = chain_derivative_p.bind(*primals, **params)
    if isinstance(tangents[0], ad.Zero):
        return [y], [rules.zero_tangent(y)]
    return [y], chain_derivative_p.bind(tangents[0], *primals[1:], **params)


def _derivative_transpose(
    cotangents: Sequence[Any], y: Any, masks: Any, words: Any, *, table: RowsTable, transposed: bool
) -> list[Any]:
    (of_result,) = cotangents
    if isinstance(of_result, ad.Zero) or not ad.is_undefined_primal(y):
        return [None, None, None]
    return [*chain_derivative_p.bind(of_result, masks, words, table=table, transposed=not transposed), None, None]


batching.primitive_batchers[chain_p] = functools.partial(rules.batch_features, chain_p, (0,))
batching.primitive_batchers[chain_derivative_p] = functools.partial(rules.batch_features, chain_derivative_p, (0, 1))
ad.primitive_jvps[chain_p] = _chain_jvp
ad.primitive_jvps[chain_derivative_p] = _derivative_jvp
ad.primitive_transposes[chain_derivative_p] = _derivative_transpose
