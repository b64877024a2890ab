"""The JAX primitives and their rules: abstract evaluation, lowering, batching, derivatives.

`network_p` runs a whole plan, `layer_p` one layer in compressed-row form. On a platform with a native back end they are
XLA custom calls; everywhere else, and for derivatives, they are the plain-XLA functions below, which read the same
arrays.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spdnn_jax import _native, layout, planner
from spdnn_jax._native import LAYER_TARGET, NETWORK_TARGET
from spdnn_jax.activation import Clip, clipped
from spdnn_jax.layout import PlanTable

PACKED = jnp.uint32
"""Features of this dtype are bit-packed: bit b of word w is neuron 32 w + b."""

_BITS = 32


# --- plain XLA --------------------------------------------------------------------------------------------------------


def unpack(y0: jax.Array, inputs: int) -> jax.Array:
    """Features as float32 (features, inputs), from any of the input forms."""
    if y0.dtype != PACKED:
        return y0.astype(jnp.float32)
    bits = (y0[:, :, None] >> jnp.arange(_BITS, dtype=PACKED)) & PACKED(1)
    return bits.reshape(y0.shape[0], y0.shape[1] * _BITS)[:, :inputs].astype(jnp.float32)


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
    *,
    table: PlanTable,
    activations: bool,
    counts: bool,
    kernel: planner.Kernel = "auto",
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What `network_p` computes, in plain XLA. Layers of one shape share one loop, so that compiling stays short."""
    del kernel  # of the CUDA back end alone
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


def layer_xla(
    y: jax.Array, indptr: jax.Array, indices: jax.Array, values: jax.Array, bias: jax.Array, *, activation: Clip
) -> jax.Array:
    """What `layer_p` computes, in plain XLA."""
    outputs = indptr.shape[0] - 1
    rows = jnp.searchsorted(indptr, jnp.arange(indices.shape[0], dtype=indptr.dtype), side="right") - 1
    products = (y[:, indices] * jnp.broadcast_to(values, indices.shape)[None]).T
    sums = jax.ops.segment_sum(products, rows, num_segments=outputs, indices_are_sorted=True).T
    sums += jnp.broadcast_to(bias, (1, outputs))
    return clipped(sums, activation.lower, activation.upper)


# --- network_p --------------------------------------------------------------------------------------------------------

network_p = Primitive("spdnn_network")
network_p.multiple_results = True


@network_p.def_abstract_eval
def _network_abstract(
    y0: Any, words: Any, *, table: PlanTable, kernel: planner.Kernel, activations: bool, counts: bool
) -> list[Any]:
    del kernel  # of the CUDA back end alone
    header = table.header
    width = int(header["inputs"])
    if y0.dtype == PACKED:
        width = -(-width // _BITS)
    elif y0.dtype not in (jnp.float32, jnp.uint8, jnp.bool_):
        raise ValueError(
            f"features must be float32, uint8, bool, or uint32 for bit-packed ones; got {y0.dtype}: convert them first"
        )
    if y0.ndim != 2 or y0.shape[1] != width:
        raise ValueError(
            f"features must have shape (features, {width}) for a network of {header['inputs']} inputs and dtype "
            f"{y0.dtype}; got {y0.shape}"
        )
    if words.shape != (int(header["words"]),) or words.dtype != jnp.uint32:
        raise ValueError(f"the plan's words must be uint32 ({header['words']},), got {words.dtype} {words.shape}")
    features = y0.shape[0]
    return [
        y0.update(shape=(features, int(header["outputs"]) if activations else 0), dtype=jnp.dtype("float32")),
        y0.update(shape=(features,), dtype=jnp.dtype("bool")),
        y0.update(shape=(len(table.layers) if counts else 0,), dtype=jnp.dtype("int32")),
    ]


def _network_cpu(ctx: Any, y0: Any, words: Any, *, table: PlanTable, **unused: Any) -> Sequence[Any]:
    del unused  # the shapes of the results say what is wanted
    return jax.ffi.ffi_lowering(NETWORK_TARGET)(ctx, y0, words, table=table.records)


def _network_cuda(
    y0: jax.Array, words: jax.Array, *, table: PlanTable, kernel: planner.Kernel, activations: bool, counts: bool
) -> Sequence[jax.Array]:
    """The custom call, with its workspace as one result more."""
    features = y0.shape[0]
    workspace = _native.cuda_workspace_bytes(table.records, features)
    results = [
        jax.ShapeDtypeStruct((features, int(table.header["outputs"]) if activations else 0), jnp.float32),
        jax.ShapeDtypeStruct((features,), jnp.bool_),
        jax.ShapeDtypeStruct((len(table.layers) if counts else 0,), jnp.int32),
        jax.ShapeDtypeStruct((workspace,), jnp.uint8),
    ]
    call = jax.ffi.ffi_call(NETWORK_TARGET, results)
    schedule = planner.schedule(table, kernel).records
    return call(y0, words, table=table.records, schedule=schedule)[:3]


def _network_batch(args: Sequence[Any], dims: Sequence[Any], **params: Any) -> tuple[list[Any], list[int]]:
    """Features do not talk to each other: a batch of feature sets is one larger set, unless they are to be counted."""
    (y0, words), (y0_dim, words_dim) = args, dims
    if words_dim is not None or params["counts"]:
        return _map_over_batch(network_p, args, dims, params)
    y0 = jnp.moveaxis(y0, y0_dim, 0)
    batch, features = y0.shape[:2]
    results = network_p.bind(y0.reshape(batch * features, -1), words, **params)
    y, alive, active = results
    return [
        y.reshape(batch, features, -1),
        alive.reshape(batch, features),
        jnp.broadcast_to(active, (batch, *active.shape)),
    ], [0, 0, 0]


def _zero_tangent(primal: Any) -> ad.Zero:
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def _network_jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    y0, words = primals
    results = network_p.bind(y0, words, **params)

    def activations_of(y0: jax.Array) -> jax.Array:
        return network_xla(y0, words, **params)[0]

    if isinstance(tangents[0], ad.Zero) or y0.dtype != jnp.float32:
        tangent = _zero_tangent(results[0])
    else:
        tangent = jax.jvp(activations_of, (y0,), (tangents[0],))[1]
    return results, [tangent, *map(_zero_tangent, results[1:])]


# --- layer_p ----------------------------------------------------------------------------------------------------------

layer_p = Primitive("spdnn_layer")


@layer_p.def_abstract_eval
def _layer_abstract(y: Any, indptr: Any, indices: Any, values: Any, bias: Any, *, activation: Clip) -> Any:
    del activation
    outputs, edges = indptr.shape[0] - 1, indices.shape[0]
    if y.ndim != 2 or y.dtype != jnp.float32:
        raise ValueError(f"features must be float32 of shape (features, inputs), got {y.dtype} {y.shape}")
    if values.shape not in ((), (edges,)):
        raise ValueError(f"values must have shape () or ({edges},), got {values.shape}")
    if bias.shape not in ((), (outputs,)):
        raise ValueError(f"bias must have shape () or ({outputs},), got {bias.shape}")
    return y.update(shape=(y.shape[0], outputs), dtype=jnp.dtype("float32"))


def _layer_custom_call(ctx: Any, *args: Any, activation: Clip) -> Sequence[Any]:
    lower, upper = np.float32(activation.lower), np.float32(activation.upper)
    return jax.ffi.ffi_lowering(LAYER_TARGET)(ctx, *args, lower=lower, upper=upper)


def _layer_batch(args: Sequence[Any], dims: Sequence[Any], *, activation: Clip) -> tuple[Any, Any]:
    if any(dim is not None for dim in dims[1:]):
        results, result_dims = _map_over_batch(layer_p, args, dims, {"activation": activation})
        return results[0], result_dims[0]
    y = jnp.moveaxis(args[0], dims[0], 0)
    batch, features = y.shape[:2]
    result = layer_p.bind(y.reshape(batch * features, -1), *args[1:], activation=activation)
    return result.reshape(batch, features, -1), 0


def _layer_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, activation: Clip) -> tuple[Any, Any]:
    y, indptr, indices, values, bias = primals
    result = layer_p.bind(*primals, activation=activation)
    differentiable, their_tangents = (y, values, bias), (tangents[0], tangents[3], tangents[4])

    def of_floats(y: jax.Array, values: jax.Array, bias: jax.Array) -> jax.Array:
        return layer_xla(y, indptr, indices, values, bias, activation=activation)

    return result, jax.jvp(of_floats, differentiable, tuple(map(ad.instantiate_zeros, their_tangents)))[1]


# --- rules common to both ---------------------------------------------------------------------------------------------


def _map_over_batch(
    primitive: Primitive, args: Sequence[Any], dims: Sequence[Any], params: dict[str, Any]
) -> tuple[list[Any], list[int]]:
    """Runs the primitive once for each member of the batch: right whatever is mapped, if not fast."""
    mapped = [k for k, dim in enumerate(dims) if dim is not None]

    def one(members: tuple[Any, ...]) -> list[Any]:
        full = list(args)
        for k, member in zip(mapped, members, strict=True):
            full[k] = member
        results = primitive.bind(*full, **params)
        return results if primitive.multiple_results else [results]

    results = jax.lax.map(one, tuple(jnp.moveaxis(args[k], dims[k], 0) for k in mapped))
    return results, [0] * len(results)


def _register(primitive: Primitive, native: dict[str, Any], xla: Any, batch: Any, jvp: Any) -> None:
    primitive.def_impl(functools.partial(jax.jit(primitive.bind, static_argnames=_STATIC[primitive.name])))
    mlir.register_lowering(primitive, mlir.lower_fun(xla, multiple_results=primitive.multiple_results))
    for platform, rule in native.items():
        mlir.register_lowering(primitive, rule, platform=platform)
    batching.primitive_batchers[primitive] = batch
    ad.primitive_jvps[primitive] = jvp


_STATIC = {"spdnn_network": ("table", "kernel", "activations", "counts"), "spdnn_layer": ("activation",)}

_network_native: dict[str, Any] = {"cpu": _network_cpu}
_layer_native: dict[str, Any] = {"cpu": _layer_custom_call}
if _native.has_cuda_library():
    _network_native["cuda"] = mlir.lower_fun(_network_cuda, multiple_results=True)
    _layer_native["cuda"] = _layer_custom_call

_register(network_p, _network_native, network_xla, _network_batch, _network_jvp)
_register(layer_p, _layer_native, layer_xla, _layer_batch, _layer_jvp)
