"""`jax.export`: layers, networks and plans as arguments of exported functions."""

import json
from typing import Any

import numpy as np
from jax import export

from spdnn_jax import _native
from spdnn_jax.activation import Clip
from spdnn_jax.chain import Rows, RowsTable
from spdnn_jax.dense import DenseProducts
from spdnn_jax.layout import PlanTable
from spdnn_jax.network import SparseLayer, SparseNetwork, TransposedIndex
from spdnn_jax.plan import Plan

export_checks = tuple(
    export.DisabledSafetyCheck.custom_call(target)
    for target in (
        _native.LAYER_TARGET,
        _native.NETWORK_TARGET,
        _native.SAMPLED_TARGET,
        _native.PERMUTED_TARGET,
        _native.CHAIN_TARGET,
        _native.CHAIN_DERIVATIVE_TARGET,
    )
)
"""What `jax.export.export` is to be told: ``export(jax.jit(infer), disabled_checks=export_checks)(plan, y0)``.

JAX gives no promise that other versions run a program with these custom calls. The program runs where `spdnn_jax` is
imported, of the version that it was exported with.
"""


def _plan_to_bytes(static: tuple[PlanTable, str]) -> bytes:
    table, kernel = static
    return json.dumps(kernel).encode() + b"\n" + table.records.tobytes()


def _plan_from_bytes(data: bytes) -> tuple[PlanTable, Any]:
    kernel, _, records = data.partition(b"\n")
    return PlanTable(np.frombuffer(records, np.uint32)), json.loads(kernel)


def _clips_to_bytes(activation: tuple[Clip, ...]) -> bytes:
    return np.array([(clip.lower, clip.upper) for clip in activation], "<f4").tobytes()


def _clips_from_bytes(data: bytes) -> tuple[Clip, ...]:
    return tuple(Clip(float(lower), float(upper)) for lower, upper in np.frombuffer(data, "<f4").reshape(-1, 2))


def _rows_from_bytes(data: bytes) -> tuple[RowsTable]:
    return (RowsTable(np.frombuffer(data, np.int64)),)


def _products_from_bytes(data: bytes) -> tuple[Any, ...]:
    layers, *others = json.loads(data)
    return tuple(layers), *others


def _register(kind: type, to_bytes: Any, from_bytes: Any) -> None:
    export.register_pytree_node_serialization(
        kind,
        serialized_name=f"spdnn_jax.{kind.__name__}",
        serialize_auxdata=to_bytes,
        deserialize_auxdata=from_bytes,
    )


_register(Plan, _plan_to_bytes, _plan_from_bytes)
_register(DenseProducts, lambda static: json.dumps(static).encode(), _products_from_bytes)
_register(SparseNetwork, _clips_to_bytes, _clips_from_bytes)
_register(Rows, lambda static: static[0].records.tobytes(), _rows_from_bytes)
_register(SparseLayer, lambda static: json.dumps(static).encode(), lambda data: tuple(json.loads(data)))
_register(TransposedIndex, lambda static: b"", lambda data: ())
