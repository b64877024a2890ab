"""What a user would write instead: one layer as a dense matrix product, as BCOO, and through cuSPARSE.

Each peer computes min(max(y W + bias, 0), cap) from activations (features, inputs) on the device, and returns a
function that starts the work; the results are compared with ours by `benchmarks/cuda_ext/gpu.py`.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse

from spdnn_jax import SparseLayer
from spdnn_jax.graph_challenge import networks

CAP = networks.ACTIVATION.upper

Run = Callable[[], Any]

_DENSE_BYTES = 4e9  # of each of input and result
_BCOO_BYTES = 8e9  # of the products that BCOO may form: one float32 for each edge and feature
_DENSE_OPERATIONS = 1e14  # of one product: 2 s at the speed of plain float32


@dataclass(frozen=True)
class Peer:
    """A contender.

    Attributes:
        name: For tables.
        prepare: Takes a layer and the activations; returns what runs it.
        features: Takes the layer, and how many features there are; returns how many it is timed on.
        wait: Waits for what a run returned.
        tolerance: Largest error against ours, as a share of the largest activation.
    """

    name: str
    prepare: Callable[[SparseLayer, jax.Array], Run]
    features: Callable[[SparseLayer, int], int]
    wait: Callable[[Any], Any]
    tolerance: float


def _dense(dtype: str, precision: Any) -> Callable[[SparseLayer, jax.Array], Run]:
    def prepare(layer: SparseLayer, y: jax.Array) -> Run:
        @jax.jit
        def apply(y: jax.Array, weights: jax.Array, bias: jax.Array) -> jax.Array:
            sums = jax.lax.dot(y, weights, precision=precision, preferred_element_type=jnp.dtype(dtype))
            return jnp.clip(sums + jnp.broadcast_to(bias, (1, sums.shape[1])), 0, CAP)

        weights = _dense_weights(layer, dtype)
        bias = jnp.asarray(layer.bias, dtype)
        y = y.astype(dtype)
        return lambda: apply(y, weights, bias)

    return prepare


def _dense_weights(layer: SparseLayer, dtype: str) -> jax.Array:
    """The weights as a dense matrix (inputs, outputs), filled on the device."""
    columns = np.repeat(np.arange(layer.outputs, dtype=np.int32), np.diff(layer.indptr))
    values = np.broadcast_to(np.asarray(layer.values), columns.shape)

    @jax.jit
    def fill(rows: jax.Array, columns: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.zeros(layer.shape, dtype).at[rows, columns].set(values.astype(dtype), unique_indices=True)

    return fill(jnp.asarray(layer.indices), jnp.asarray(columns), jnp.asarray(values))


def _bcoo(layer: SparseLayer, y: jax.Array) -> Run:
    columns = np.repeat(np.arange(layer.outputs, dtype=np.int32), np.diff(layer.indptr))
    indices = jnp.asarray(np.stack([np.asarray(layer.indices), columns], axis=1))
    values = jnp.asarray(np.broadcast_to(np.asarray(layer.values), columns.shape))
    weights = sparse.BCOO((values, indices), shape=layer.shape, unique_indices=True)
    bias = jnp.asarray(layer.bias)

    @jax.jit
    def apply(y: jax.Array, weights: sparse.BCOO, bias: jax.Array) -> jax.Array:
        sums = y @ weights
        return jnp.clip(sums + jnp.broadcast_to(bias, (1, sums.shape[1])), 0, CAP)

    return lambda: apply(y, weights, bias)


def _cusparse(transposed: bool) -> Callable[[SparseLayer, jax.Array], Run]:
    """CSR of shape (outputs, inputs) times the activations, which lie feature by feature, or neuron by neuron.

    A kernel of CuPy's adds the bias and clips in place. The result lies feature by feature: cuSPARSE writes it so.
    """

    def prepare(layer: SparseLayer, y: jax.Array) -> Run:
        cupy: Any = importlib.import_module("cupy")
        cupyx_sparse: Any = importlib.import_module("cupyx.scipy.sparse")
        cusparse: Any = importlib.import_module("cupyx.cusparse")
        cupy.get_default_memory_pool().free_all_blocks()  # of the contender before
        values = np.ascontiguousarray(np.broadcast_to(np.asarray(layer.values), np.shape(layer.indices)), np.float32)
        parts = (values, np.asarray(layer.indices, np.int32), np.asarray(layer.indptr, np.int32))
        weights = cupyx_sparse.csr_matrix(tuple(map(cupy.asarray, parts)), shape=layer.shape[::-1])
        weights.sum_duplicates()  # there are none: cuSPARSE wants to have been told
        operand = cupy.from_dlpack(jax.block_until_ready(y)).T  # (inputs, features), column by column
        if transposed:
            operand = cupy.asfortranarray(operand.T)  # (features, inputs), column by column
        result = cupy.empty((layer.outputs, len(y)), cupy.float32, order="F")
        bias = cupy.asarray(np.broadcast_to(np.asarray(layer.bias), (layer.outputs,)).astype(np.float32)[:, None])
        clip = cupy.ElementwiseKernel(
            "float32 bias, float32 cap", "float32 sum", "sum = min(max(sum + bias, 0.0f), cap)", "spdnn_peer_clip"
        )

        def run() -> Any:
            cusparse.spmm(weights, operand, c=result, transb=transposed)
            clip(bias, np.float32(CAP), result)
            return result.T

        return run

    return prepare


def _wait_for_cupy(_: Any) -> None:
    importlib.import_module("cupy").cuda.get_current_stream().synchronize()


def _features_of_dense(layer: SparseLayer, count: int) -> int:
    by_bytes = _DENSE_BYTES / (4 * max(layer.shape))
    by_time = _DENSE_OPERATIONS / (2 * layer.inputs * layer.outputs)
    return _rounded(min(count, by_bytes, by_time))


def _features_of_bcoo(layer: SparseLayer, count: int) -> int:
    return _rounded(min(count, _BCOO_BYTES / (4 * layer.edges), _DENSE_BYTES / (4 * max(layer.shape))))


def _features_of_cusparse(layer: SparseLayer, count: int) -> int:
    return _rounded(min(count, _DENSE_BYTES / (4 * max(layer.shape))))


def _rounded(count: float) -> int:
    """Down to a multiple of 128 where there are as many: odd sizes would slow a dense product."""
    return max(int(count) // 128 * 128, 1) if count >= 128 and count != int(count) else max(int(count), 1)


def on_host(result: Any) -> np.ndarray:
    """A peer's result, which may be an array of CuPy's: these are fetched so."""
    return np.asarray(result.get() if hasattr(result, "get") else result)


def difference(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference of two results, as a share of the largest activation."""
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64)).max()
    return float(error / max(float(expected.max()), 1e-30))


PEERS = (
    Peer(
        "dense float32",
        _dense("float32", jax.lax.Precision.HIGHEST),
        _features_of_dense,
        jax.block_until_ready,
        1e-4,
    ),
    Peer(
        "dense TF32",
        _dense("float32", jax.lax.DotAlgorithmPreset.TF32_TF32_F32),
        _features_of_dense,
        jax.block_until_ready,
        1e-2,
    ),
    Peer("dense bf16", _dense("bfloat16", None), _features_of_dense, jax.block_until_ready, 5e-2),
    Peer("JAX BCOO", _bcoo, _features_of_bcoo, jax.block_until_ready, 1e-4),
    Peer("cuSPARSE CSR, by feature", _cusparse(False), _features_of_cusparse, _wait_for_cupy, 1e-4),
    Peer("cuSPARSE CSR, by neuron", _cusparse(True), _features_of_cusparse, _wait_for_cupy, 1e-4),
)
"""All of them."""
