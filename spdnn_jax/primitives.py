"""The JAX primitives and their rules: abstract evaluation, lowering, batching, derivatives.

`network_p` runs a whole plan, `layer_p` one layer in compressed-row form. On a platform with a native back end they are
XLA custom calls; everywhere else, and for derivatives, they are the plain-XLA functions below, which read the same
arrays.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching
from jax.sharding import PartitionSpec as P

from spdnn_jax import _native, layout, planner, rules
from spdnn_jax._native import NETWORK_TARGET
from spdnn_jax.activation import clipped
from spdnn_jax.chain import RowsTable, chain_derivative_p, chain_p
from spdnn_jax.features import BITS, PACKED
from spdnn_jax.layout import PlanTable

# --- plain XLA --------------------------------------------------------------------------------------------------------


def unpack(y0: jax.Array, inputs: int) -> jax.Array:
    """Features as float32 (..., inputs), from any of the input forms."""
    if y0.dtype != PACKED:
        return y0.astype(jnp.float32)
    places = jnp.arange(BITS, dtype=PACKED).reshape(*[1] * y0.ndim, BITS)
    bits = (y0[..., None] >> places) & PACKED(1)
    return bits.reshape(*y0.shape[:-1], y0.shape[-1] * BITS)[..., :inputs].astype(jnp.float32)


def _zero_column(y: jax.Array) -> jax.Array:
    """Zeros, float32 (features, 1), whatever y holds, of a type that varies over a mesh as y does: `shard_map` asks so.

    XLA drops the sum, which nobody reads.
    """
    return jnp.where(False, jnp.sum(y, axis=1, keepdims=True), 0)


def _run_xla(y: jax.Array, words: jax.Array, run: np.void, index_bits: int, offsets: jax.Array) -> jax.Array:
    """Sums of one run, float32 (features, slots)."""
    groups, edges, outputs = (int(run[name]) for name in ("groups", "edges", "group_outputs"))
    if edges == 0:
        return jnp.broadcast_to(_zero_column(y), (y.shape[0], groups * outputs))
    indices = layout.run_indices(words, run, index_bits, offsets[0])
    if run["value_offset"] < 0:
        values = jnp.full((groups, edges, outputs), run["value"], jnp.float32)
    else:
        values = layout.run_values(words, run, offsets[1])

    def add_edge(sums: jax.Array, edge: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        index, value = edge
        return sums + y[:, index][:, :, None] * value[None], None

    zeros = jnp.broadcast_to(_zero_column(y)[:, :, None], (y.shape[0], groups, outputs))
    sums, _ = jax.lax.scan(add_edge, zeros, (indices.T, jnp.swapaxes(values, 0, 1)))
    return layout.to_slot_order(sums, run)


def _layer_of_plan_xla(
    y: jax.Array, words: jax.Array, layer: np.void, runs: np.ndarray, offsets: jax.Array
) -> jax.Array:
    sums = [
        _run_xla(y, words, run, int(layer["index_bits"]), offsets[1 + 2 * k : 3 + 2 * k]) for k, run in enumerate(runs)
    ]
    sums = jnp.concatenate(sums, axis=1) if sums else _zero_column(y)[:, :0]
    bias = layout.layer_bias(words, layer, offsets[0])
    sums += jnp.broadcast_to(bias, (1, sums.shape[1]))
    return clipped(sums, layer["lower"], layer["upper"])


def _count_active(y: jax.Array) -> jax.Array:
    return jnp.sum(jnp.any(y != 0, axis=1), dtype=jnp.int32)


def _stretch_xla(y: jax.Array, words: jax.Array, table: PlanTable, first: int, end: int) -> tuple[jax.Array, jax.Array]:
    """Runs layers first .. end, all of one width, in one loop with one body for each shape of layer among them."""
    shapes = [layout.layer_shape(table, layer) for layer in range(first, end)]
    kinds = list(dict.fromkeys(shapes))
    offsets = [layout.layer_offsets(table, layer) for layer in range(first, end)]
    longest = max(map(len, offsets))
    rows = np.stack([np.pad(row, (0, longest - len(row))) for row in offsets]).astype(np.int32)

    def body(kind: layout.LayerShape) -> Any:
        layer = first + shapes.index(kind)
        return lambda y, offsets: _layer_of_plan_xla(y, words, table.layers[layer], table.runs_of(layer), offsets)

    bodies = [body(kind) for kind in kinds]
    if end - first == 1:
        y = bodies[0](y, jnp.asarray(rows[0]))
        return y, _count_active(y)[None]

    def step(y: jax.Array, layer: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        kind, offsets = layer
        y = jax.lax.switch(kind, bodies, y, offsets)
        return y, _count_active(y)

    kind_of_layer = np.asarray([kinds.index(shape) for shape in shapes], np.int32)
    return jax.lax.scan(step, y, (jnp.asarray(kind_of_layer), jnp.asarray(rows)))


def network_xla(
    y0: jax.Array,
    words: jax.Array,
    *row_words: jax.Array,
    table: PlanTable,
    activations: bool,
    counts: bool,
    kernel: planner.Kernel = "auto",
    rows: RowsTable | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `network_p` computes, in plain XLA. Layers of one shape share one loop, so that compiling stays short."""
    del kernel, row_words, rows  # of the CUDA back end, and of derivatives, alone
    header = table.header
    if header["words"] > np.iinfo(np.int32).max:
        raise ValueError("the plain-XLA path addresses plans of at most 8 GiB: use a native back end")
    y = unpack(y0, int(header["inputs"]))
    active = []
    for first, end in layout.stretches(table):
        y, stretch_active = _stretch_xla(y, words, table, first, end)
        active.append(stretch_active)
    alive = jnp.any(y != 0, axis=1)
    slots = jax.lax.bitcast_convert_type(
        jax.lax.slice_in_dim(words, int(header["slot_offset"]), int(header["slot_offset"] + header["outputs"])),
        jnp.int32,
    )
    result = y[:, slots] if activations else jnp.zeros((y.shape[0], 0), jnp.float32)
    return result, alive, jnp.concatenate(active) if counts else jnp.zeros((0,), jnp.int32)


# --- network_p --------------------------------------------------------------------------------------------------------


def _network_abstract(
    y0: Any,
    words: Any,
    *row_words: Any,
    table: PlanTable,
    rows: RowsTable | None,
    kernel: planner.Kernel,
    activations: bool,
    counts: bool,
) -> list[Any]:
    del kernel, row_words, rows  # of the CUDA back end, and of derivatives, alone
    header = table.header
    width = int(header["inputs"])
    if y0.dtype == PACKED:
        width = -(-width // BITS)
    elif y0.dtype not in (jnp.float32, jnp.uint8, jnp.bool_):
        raise ValueError(
            f"features must be float32, uint8, bool, or uint32 for bit-packed ones; got {y0.dtype}: convert them first"
        )
    if y0.ndim < 1 or y0.shape[-1] != width:
        raise ValueError(
            f"features must have shape (features, {width}) for a network of {header['inputs']} inputs and dtype "
            f"{y0.dtype}; got {y0.shape}"
        )
    if words.shape != (int(header["words"]),) or words.dtype != jnp.uint32:
        raise ValueError(f"the plan's words must be uint32 ({header['words']},), got {words.dtype} {words.shape}")
    rules.check_features_whole(y0)
    leading = y0.shape[:-1]
    one_less = y0.sharding.update(spec=P(*y0.sharding.spec[: len(leading)]))
    return [
        y0.update(shape=(*leading, int(header["outputs"]) if activations else 0), dtype=jnp.dtype("float32")),
        y0.update(shape=leading, dtype=jnp.dtype("bool"), sharding=one_less),
        rules.sum_of(y0, (len(table.layers) if counts else 0,), dtype=jnp.dtype("int32")),
    ]


def _network_cpu(
    y0: jax.Array, words: jax.Array, *row_words: jax.Array, table: PlanTable, **params: Any
) -> Sequence[jax.Array]:
    del row_words
    counted = rules.work_to_count(words[0], y0.shape[0] * float(table.layers["multiplied_edges"].sum()))
    return jax.ffi.ffi_call(NETWORK_TARGET, _results(y0, table, **params))(y0, words, *counted, table=table.records)


def _network_cuda(
    y0: jax.Array, words: jax.Array, *row_words: jax.Array, table: PlanTable, kernel: planner.Kernel, **params: Any
) -> Sequence[jax.Array]:
    """The custom call, with its workspace as one result more."""
    del row_words
    features, narrow = y0.shape[0], y0.dtype != jnp.float32
    schedule = planner.schedule(table, kernel, narrow_input=narrow, features=features).records
    workspace = jax.ShapeDtypeStruct((_native.cuda_workspace_bytes(table.records, features),), jnp.uint8)
    call = jax.ffi.ffi_call(NETWORK_TARGET, [*_results(y0, table, **params), workspace])
    return call(y0, words, table=table.records, schedule=schedule)[:3]


def _results(
    y0: jax.Array, table: PlanTable, *, activations: bool, counts: bool, **unused: Any
) -> list[jax.ShapeDtypeStruct]:
    del unused
    features = y0.shape[0]
    return [
        jax.ShapeDtypeStruct((features, int(table.header["outputs"]) if activations else 0), jnp.float32),
        jax.ShapeDtypeStruct((features,), jnp.bool_),
        jax.ShapeDtypeStruct((len(table.layers) if counts else 0,), jnp.int32),
    ]


network_p = rules.define(
    rules.Kernel("spdnn_network", network_xla, rules.native(_network_cpu, _network_cuda), sums=(2,)),
    _network_abstract,
)


def _network_batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
    """A batch of feature sets is one set with an axis more, unless they are to be counted."""
    if params["counts"]:
        return rules.map_over_batch(network_p, args, dims, **params)
    (*results, active), result_dims = rules.batch_features(network_p, (0,), args, dims, **params)
    return [*results, jnp.zeros((results[0].shape[0], 0), active.dtype)], result_dims


def _network_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, rows: RowsTable | None, **params: Any) -> Any:
    """Only activations have a tangent, and only in features that are floating-point numbers."""
    y0, _, *row_words = primals
    has_tangent = not isinstance(tangents[0], ad.Zero) and jnp.issubdtype(y0.dtype, jnp.floating)
    if not has_tangent or not params["activations"]:
        results = network_p.bind(*primals, rows=rows, **params)
        return results, [rules.zero_tangent(result) for result in results]
    if rows is None:
        raise ValueError(
            "the plan holds nothing for derivatives: build it with build_plan(..., derivatives=True), or call "
            "plan.with_derivatives(). To train the weights, too, differentiate spdnn_jax.apply(network, y)"
        )
    y0_dot: Any = tangents[0]
    y0, y0_dot = y0.astype(jnp.float32), jax.lax.convert_element_type(y0_dot, jnp.float32)
    y, masks = chain_p.bind(y0, *row_words, table=rows)
    (y_dot,) = chain_derivative_p.bind(y0_dot, masks, *row_words, table=rows, transposed=False)
    if params["counts"]:
        _, alive, active = network_p.bind(*primals, rows=rows, **params)
    else:
        alive, active = jnp.any(y != 0, axis=-1), jnp.zeros((0,), jnp.int32)
    return [y, alive, active], [y_dot, rules.zero_tangent(alive), rules.zero_tangent(active)]


batching.primitive_batchers[network_p] = _network_batch
ad.primitive_jvps[network_p] = _network_jvp
