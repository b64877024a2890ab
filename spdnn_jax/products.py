"""The primitives of one layer in compressed rows, and their derivatives of all orders, forward and reverse.

`layer_p` is the layer itself. Its derivatives are made of two more, each linear in each of its float arguments, and
each the derivative and the transpose of the others:

    product_p    y = x W, or x = y W^T where `transposed`
    sampled_p    of each edge (i, j), the sum over features of x[., i] y[., j]

Weights come as values of the edges and two index structures, one compressed by output neuron and one by input neuron,
so that every sum is gathered: no kernel adds to memory that another thread adds to, and results do not depend on the
run.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters import ad, batching

from spdnn_jax import _native, rules
from spdnn_jax._native import LAYER_TARGET, PERMUTED_TARGET, SAMPLED_TARGET
from spdnn_jax.activation import clipped

# --- plain XLA --------------------------------------------------------------------------------------------------------


def transposed_index(indptr: jax.Array, indices: jax.Array, inputs: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The structure compressed by input neuron.

    Args:
        indptr: int32 (outputs + 1,).
        indices: int32 (edges,).
        inputs: Number of input neurons.

    Returns:
        int32: (inputs + 1,), where the edges of each input begin; (edges,), the output neuron of each; (edges,), the
        number of each among the edges of the layer.
    """
    edges = jnp.argsort(indices, stable=True).astype(jnp.int32)
    starts = jnp.searchsorted(indices[edges], jnp.arange(inputs + 1, dtype=indices.dtype)).astype(jnp.int32)
    return starts, _row_of_edge(indptr, indices.shape[0])[edges], edges


def _row_of_edge(indptr: jax.Array, edges: int) -> jax.Array:
    return jnp.searchsorted(indptr, jnp.arange(edges, dtype=indptr.dtype), side="right").astype(jnp.int32) - 1


def layer_xla(
    y: jax.Array,
    values: jax.Array,
    bias: jax.Array,
    indptr: jax.Array,
    indices: jax.Array,
    *index: jax.Array,
    lower: float,
    upper: float,
) -> list[jax.Array]:
    """What `layer_p` computes, in plain XLA."""
    del index  # of derivatives alone
    outputs = indptr.shape[0] - 1
    products = (y[:, indices] * jnp.broadcast_to(values, (1, indices.shape[0]))).T
    rows = _row_of_edge(indptr, indices.shape[0])
    sums = jax.ops.segment_sum(products, rows, num_segments=outputs, indices_are_sorted=True).T
    return [clipped(sums + jnp.broadcast_to(bias, (1, outputs)), lower, upper)]


def _product_xla(
    x: jax.Array,
    values: jax.Array,
    indptr: jax.Array,
    indices: jax.Array,
    *index: jax.Array,
    transposed: bool,
) -> list[jax.Array]:
    if transposed:
        indptr, indices, edges = index
        values = values if values.ndim == 0 else values[edges]
    return layer_xla(x, values, jnp.float32(0), indptr, indices, lower=-np.inf, upper=np.inf)


def _sampled_xla(x: jax.Array, y: jax.Array, indptr: jax.Array, indices: jax.Array, *index: jax.Array) -> list[Any]:
    del index

    def add_feature(sums: jax.Array, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return sums + ends[0][indices] * ends[1][rows], None

    rows = _row_of_edge(indptr, indices.shape[0])
    zeros = rules.varying_alike(jnp.zeros(indices.shape, jnp.float32), x, y)[0]
    return [jax.lax.scan(add_feature, zeros, (x, y))[0]]


# --- abstract evaluation ----------------------------------------------------------------------------------------------


def _check_edges(values: Any, indptr: Any, indices: Any) -> None:
    del indptr
    if values.shape not in ((), indices.shape):
        raise ValueError(f"values must have shape () or {indices.shape}, got {values.shape}")


def _layer_abstract(y: Any, values: Any, bias: Any, indptr: Any, indices: Any, *index: Any, **clip: float) -> list[Any]:
    del index, clip
    outputs = indptr.shape[0] - 1
    if y.ndim < 1 or y.dtype != jnp.float32:
        raise ValueError(f"features must be float32 of shape (..., features, inputs), got {y.dtype} {y.shape}")
    _check_edges(values, indptr, indices)
    if bias.shape not in ((), (outputs,)):
        raise ValueError(f"bias must have shape () or ({outputs},), got {bias.shape}")
    rules.check_features_whole(y)
    return [y.update(shape=(*y.shape[:-1], outputs), dtype=jnp.dtype("float32"))]


def _product_abstract(x: Any, values: Any, indptr: Any, indices: Any, *index: Any, transposed: bool) -> list[Any]:
    rules.check_features_whole(x)
    _check_edges(values, indptr, indices)
    width = (index[0] if transposed else indptr).shape[0] - 1
    return [x.update(shape=(*x.shape[:-1], width))]


def _sampled_abstract(x: Any, y: Any, indptr: Any, indices: Any, *index: Any) -> list[Any]:
    del indptr, index
    rules.check_features_whole(x, y)
    return [rules.sum_of(x, indices.shape)]


# --- lowering ---------------------------------------------------------------------------------------------------------


def _call_layer(
    y: jax.Array,
    values: jax.Array,
    bias: jax.Array,
    indptr: jax.Array,
    indices: jax.Array,
    *index: jax.Array,
    lower: float,
    upper: float,
    cuda: bool = False,
) -> Sequence[jax.Array]:
    """The custom call; on a GPU its workspace is one result more."""
    del index
    features, outputs = y.shape[0], indptr.shape[0] - 1
    results = [jax.ShapeDtypeStruct((features, outputs), jnp.float32)]
    if cuda:
        size = _native.cuda_product_workspace_bytes(features, y.shape[1], outputs, indices.shape[0])
        results.append(jax.ShapeDtypeStruct((size,), jnp.uint8))
    call = jax.ffi.ffi_call(LAYER_TARGET, results)
    return call(y, indptr, indices, values, bias, lower=np.float32(lower), upper=np.float32(upper))[:1]


def _call_product(
    x: jax.Array,
    values: jax.Array,
    indptr: jax.Array,
    indices: jax.Array,
    *index: jax.Array,
    transposed: bool,
    cuda: bool = False,
) -> Sequence[jax.Array]:
    """Weights of the transposed product are brought into its order first, outside the kernel."""
    if transposed:
        indptr, indices, edges = index
        permuted = _permuted_cuda if cuda else _permuted_cpu
        values = values if values.ndim == 0 else permuted(values, edges)
    return _call_layer(x, values, jnp.float32(0), indptr, indices, lower=-np.inf, upper=np.inf, cuda=cuda)


def _permuted_cpu(values: jax.Array, order: jax.Array) -> jax.Array:
    """values[order]: a call of our own, for XLA compiles 15 ms for each gather, and a program has one a layer."""
    return jax.ffi.ffi_call(PERMUTED_TARGET, values)(values, order)


def _permuted_cuda(values: jax.Array, order: jax.Array) -> jax.Array:
    """values[order], without the code that jnp wraps around it."""
    numbers = jax.lax.GatherDimensionNumbers(offset_dims=(), collapsed_slice_dims=(0,), start_index_map=(0,))
    mode = jax.lax.GatherScatterMode.PROMISE_IN_BOUNDS
    return jax.lax.gather(values, order[:, None], numbers, (1,), unique_indices=True, mode=mode)


def _call_sampled(
    x: jax.Array, y: jax.Array, indptr: jax.Array, indices: jax.Array, *index: jax.Array, cuda: bool = False
) -> Sequence[jax.Array]:
    """The custom call; on a GPU its workspace is one result more."""
    del index
    results = [jax.ShapeDtypeStruct(indices.shape, jnp.float32)]
    if cuda:
        size = _native.cuda_sampled_workspace_bytes(x.shape[0], x.shape[1], y.shape[1], indices.shape[0])
        results.append(jax.ShapeDtypeStruct((size,), jnp.uint8))
    return jax.ffi.ffi_call(SAMPLED_TARGET, results)(x, y, indptr, indices)[:1]


layer_p = rules.define(rules.Kernel("spdnn_layer", layer_xla, rules.native(_call_layer)), _layer_abstract)
product_p = rules.define(rules.Kernel("spdnn_product", _product_xla, rules.native(_call_product)), _product_abstract)
sampled_p = rules.define(
    rules.Kernel("spdnn_sampled", _sampled_xla, rules.native(_call_sampled), features=(0, 1), sums=(0,)),
    _sampled_abstract,
)


# --- derivatives ------------------------------------------------------------------------------------------------------


def _product(x: Any, values: Any, structure: Sequence[Any], *, transposed: bool = False) -> jax.Array:
    return product_p.bind(x, values, *structure, transposed=transposed)[0]


def _sampled(x: Any, y: Any, structure: Sequence[Any], like: Any) -> jax.Array:
    """The derivative in the values, of their shape: one sum where one value serves all edges."""
    (sums,) = sampled_p.bind(x, y, *structure)
    return sums if like.ndim else jnp.sum(sums)


def _sum_of(terms: list[jax.Array], primal: Any) -> Any:
    return functools.reduce(jnp.add, terms) if terms else rules.zero_tangent(primal)


def _is_known(tangent: Any) -> bool:
    return not isinstance(tangent, ad.Zero)


def _layer_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, lower: float, upper: float) -> tuple[Any, Any]:
    """The tangent of a clipped sum is that of the sum, or 0 where it is clipped, at the bounds, too."""
    y, values, _, indptr, indices, *index = primals
    y_dot, values_dot, bias_dot = tangents[:3]
    (result,) = layer_p.bind(*primals, lower=lower, upper=upper)
    structure = (indptr, indices, *(index or transposed_index(indptr, indices, y.shape[-1])))
    terms = []
    if _is_known(y_dot):
        terms.append(_product(y_dot, values, structure))
    if _is_known(values_dot):
        terms.append(_product(y, values_dot, structure))
    if _is_known(bias_dot):
        terms.append(jnp.broadcast_to(bias_dot, result.shape))
    if not terms:
        return [result], [rules.zero_tangent(result)]
    tangent = _sum_of(terms, result)
    if np.isfinite(lower) or np.isfinite(upper):
        tangent = jnp.where((result > lower) & (result < upper), tangent, jnp.float32(0))
    return [result], [tangent]


def _product_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, transposed: bool) -> tuple[Any, Any]:
    x, values, *structure = primals
    result = _product(x, values, structure, transposed=transposed)
    terms = []
    if _is_known(tangents[0]):
        terms.append(_product(tangents[0], values, structure, transposed=transposed))
    if _is_known(tangents[1]):
        terms.append(_product(x, tangents[1], structure, transposed=transposed))
    return [result], [_sum_of(terms, result)]


def _product_transpose(cotangents: Sequence[Any], x: Any, values: Any, *structure: Any, transposed: bool) -> list[Any]:
    (y,) = cotangents
    nothing = [None] * len(structure)
    if isinstance(y, ad.Zero):
        return [None, None, *nothing]
    if ad.is_undefined_primal(x):
        return [_product(y, values, structure, transposed=not transposed), None, *nothing]
    ends = (y, x) if transposed else (x, y)
    return [None, _sampled(*ends, structure, values.aval), *nothing]


def _sampled_jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    x, y, *structure = primals
    result = sampled_p.bind(*primals)[0]
    terms = []
    if _is_known(tangents[0]):
        terms += sampled_p.bind(tangents[0], y, *structure)
    if _is_known(tangents[1]):
        terms += sampled_p.bind(x, tangents[1], *structure)
    return [result], [_sum_of(terms, result)]


def _sampled_transpose(cotangents: Sequence[Any], x: Any, y: Any, *structure: Any) -> list[Any]:
    (values,) = cotangents
    nothing = [None] * len(structure)
    if isinstance(values, ad.Zero):
        return [None, None, *nothing]
    if ad.is_undefined_primal(x):
        return [_product(y, values, structure, transposed=True), None, *nothing]
    return [None, _product(x, values, structure), *nothing]


batching.primitive_batchers[layer_p] = functools.partial(rules.batch_features, layer_p, (0,))
batching.primitive_batchers[product_p] = functools.partial(rules.batch_features, product_p, (0,))
batching.primitive_batchers[sampled_p] = functools.partial(rules.map_over_batch, sampled_p)
ad.primitive_jvps[layer_p] = _layer_jvp
ad.primitive_jvps[product_p] = _product_jvp
ad.primitive_jvps[sampled_p] = _sampled_jvp
ad.primitive_transposes[product_p] = _product_transpose
ad.primitive_transposes[sampled_p] = _sampled_transpose


def layer(
    y: jax.Array, values: jax.Array, bias: jax.Array, *structure: jax.Array, lower: float, upper: float
) -> jax.Array:
    """A layer, clip(y W + bias, lower, upper).

    Args:
        y: float32 (..., features, inputs).
        values: float32 (edges,) or ().
        bias: float32 (outputs,) or ().
        structure: indptr and indices; and the three of `transposed_index`, else a derivative works them out.
        lower: The lower bound.
        upper: The upper bound.
    """
    y, values, bias = rules.varying_alike(y, values, bias)
    return layer_p.bind(y, values, bias, *structure, lower=lower, upper=upper)[0]
