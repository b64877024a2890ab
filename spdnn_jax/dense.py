"""Layers as dense products of XLA's: their weights, beside a plan, and a plan run with some of its layers so.

Which layers, and for how many features, `costs` says. All others run on the plan's kernels, in parts between products.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from spdnn_jax import costs, layout, primitives, rules
from spdnn_jax._native import core
from spdnn_jax.activation import clipped
from spdnn_jax.chain import RowsTable
from spdnn_jax.costs import Device, Precision
from spdnn_jax.layout import PlanTable
from spdnn_jax.primitives import network_p


@dataclass(frozen=True)
class _Arithmetic:
    """How XLA is asked for a product.

    Attributes:
        dtype: Of its inputs.
        precision: Of it.
        largest: Number that its inputs may be: a larger one would become infinite, and infinite times 0 is NaN.
    """

    dtype: Any
    precision: jax.lax.Precision
    largest: float


_LARGEST = float(np.finfo(np.float32).max)

_ARITHMETIC: dict[Precision, _Arithmetic] = {
    "float32": _Arithmetic(jnp.float32, jax.lax.Precision.HIGHEST, _LARGEST),
    "tf32": _Arithmetic(jnp.float32, jax.lax.Precision.HIGH, (2 - 2.0**-10) * 2.0**127),
    "bfloat16": _Arithmetic(jnp.bfloat16, jax.lax.Precision.DEFAULT, float(jnp.finfo(jnp.bfloat16).max)),
}


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weights", "biases"],
    meta_fields=["layers", "precision", "device"],
)
@dataclass(frozen=True, eq=False)
class DenseProducts:
    """Layers of a plan with all their weights. A pytree, whose arrays are constants: nothing is differentiated in them.

    Attributes:
        weights: Of each layer, (inputs, outputs), float32 or, where that is allowed and gains, bfloat16. Inputs stand
            in the plan's slot order, outputs, too, but for those of the plan's last layer.
        biases: Of each layer, float32 (outputs,).
        layers: Their numbers in the plan, counted from 0, ascending.
        precision: What may be rounded to.
        device: Where the plan is to run: what is fast there was measured there.
    """

    weights: tuple[jax.Array, ...]
    biases: tuple[jax.Array, ...]
    layers: tuple[int, ...]
    precision: Precision
    device: Device

    @classmethod
    def of_plan(cls, table: PlanTable, words: np.ndarray, precision: Precision, device: Device) -> "DenseProducts":
        """The layers of a plan for which a dense product may be the faster one, on the default device.

        Args:
            table: The plan's records.
            words: uint32, the plan, on the host.
            precision: What may be rounded to.
            device: Where the plan is to run.

        Raises:
            ValueError: There is no such precision.
        """
        if precision not in costs.PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(costs.PRECISIONS)}; got {precision!r}")
        dtype = _ARITHMETIC[costs.computed_in(precision, device)].dtype
        layers = costs.candidates(table, device, precision, jnp.dtype(dtype).itemsize)
        pairs = [_weights_and_bias(table, words, layer, dtype) for layer in layers]
        weights, biases = (tuple(jax.device_put(pair[k]) for pair in pairs) for k in (0, 1))
        return cls(weights, biases, layers, precision, device)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(array.nbytes for array in self.weights + self.biases)

    def chosen(self, table: PlanTable, features: int) -> tuple[int, ...]:
        """Which layers are dense products in a call with so many features."""
        return costs.chosen(table, self.layers, self.device, self.precision, features) if self.layers else ()

    def sums(self, y: jax.Array, layer: int) -> jax.Array:
        """A layer without its activation: from float32 (..., inputs) to float32 (..., outputs)."""
        place = self.layers.index(layer)
        weights, bias = self.weights[place], self.biases[place]
        how = _ARITHMETIC[costs.computed_in(self.precision, self.device)]
        if how.largest < _LARGEST:
            y = jnp.clip(y, -how.largest, how.largest).astype(how.dtype)
        product = jax.lax.dot_general(
            y, weights, (((y.ndim - 1,), (0,)), ((), ())),
            precision=how.precision, preferred_element_type=jnp.float32,
        )  # fmt: skip
        return product + bias.reshape(*[1] * (y.ndim - 1), bias.shape[0])

    def summary(self, table: PlanTable) -> str:
        """Which layers are dense products, for how many features and why, in one line."""
        computed = costs.computed_in(self.precision, self.device)
        head = f"dense products in {self.precision}" + ("" if computed == self.precision else f", here {computed}")
        if not self.layers:
            return f"{head}: for no layer, {costs.why_none(table)}"
        layers_by_time: dict[str, list[int]] = {}
        for layer in self.layers:
            layers_by_time.setdefault(costs.when(table, layer, self.device, self.precision), []).append(layer)
        parts = [
            f"for {len(layers):,} of {len(table.layers):,} {features}, where they are faster: these hold "
            f"{100 * min(costs.density(table, layer) for layer in layers):.3g}% of all weights or more"
            for features, layers in layers_by_time.items()
        ]
        return f"{head}: {'; '.join(parts)}"


def _weights_and_bias(table: PlanTable, words: np.ndarray, layer: int, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    part = layout.cut(words, table, layer, layer + 1)
    records, rows = core.build_rows(PlanTable(part).records, part)
    (row,) = RowsTable(records).layers
    inputs, outputs, edges = (int(row[name]) for name in ("inputs", "outputs", "edges"))

    def section(name: str, size: int, kind: Any) -> np.ndarray:
        return rows[int(row[name]) :][:size].view(kind)

    weights = np.zeros(inputs * outputs, dtype)  # filled input by input, as it lies
    starts = np.repeat(np.arange(inputs) * outputs, np.diff(section("column_offset", inputs + 1, np.int32)))
    places = starts + section("output_offset", edges, np.int32)
    weights[places] = section("weight_offset", edges, np.float32).astype(dtype)
    return weights.reshape(inputs, outputs), section("bias_offset", outputs, np.float32).copy()


def network(
    y0: jax.Array,
    words: jax.Array,
    row_words: Sequence[jax.Array],
    products: DenseProducts,
    *,
    layers: tuple[int, ...],
    **static: Any,
) -> list[jax.Array]:
    """What `network_p` computes, with some layers as dense products.

    Its derivative is that of `network_p`: float32 throughout, without dense products.

    Args:
        y0: The features, as for `network_p`.
        words: The plan's.
        row_words: Those for derivatives, or none.
        products: The dense products of the plan.
        layers: Which of them to take.
        static: The parameters of `network_p`.
    """
    run: Any = jax.custom_jvp(functools.partial(_forward, layers=layers, **static))

    def derivative(primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
        y0, words, row_words, _ = primals
        if isinstance(tangents[0], SymbolicZero):  # no derivative in the features is asked for, and there is no other
            results = run(*primals)
            return results, [SymbolicZero(jax.typeof(result).to_tangent_aval()) for result in results]
        return jax.jvp(lambda y0: network_p.bind(y0, words, *row_words, **static), (y0,), (tangents[0],))

    run.defjvp(derivative, symbolic_zeros=True)
    return run(y0, words, list(row_words), products)


def _forward(
    y0: jax.Array,
    words: jax.Array,
    row_words: Sequence[jax.Array],
    products: DenseProducts,
    *,
    layers: tuple[int, ...],
    table: PlanTable,
    kernel: Any,
    activations: bool,
    counts: bool,
    rows: RowsTable | None,
) -> list[jax.Array]:
    del row_words, rows  # of the derivative alone
    rules.check_features_whole(jax.typeof(y0))
    y, alive, active = y0, None, []
    for first, end in _parts(len(table.layers), layers):
        if first in layers:
            y, alive, counted = _dense_layer(y, products, table, first)
        else:
            part, wanted = layout.cut(words, table, first, end), activations or end < len(table.layers)
            y, alive, counted = network_p.bind(
                y, part, table=layout.cut_table(table, first, end), rows=None, kernel=kernel, activations=wanted,
                counts=counts,
            )  # fmt: skip
        active.append(counted)
    assert alive is not None
    no_counts = jnp.zeros((0,), jnp.int32)
    return [y if activations else y[..., :0], alive, jnp.concatenate(active) if counts else no_counts]


def _parts(count: int, dense: tuple[int, ...]) -> list[tuple[int, int]]:
    """Stretches (first, end) of so many layers: each dense one alone, what is between them as long as it is."""
    bounds = sorted({0, count, *dense, *(layer + 1 for layer in dense)})
    return list(itertools.pairwise(bounds))


def _dense_layer(
    y: jax.Array, products: DenseProducts, table: PlanTable, layer: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As a plan of one layer: activations, which features are active, and how many."""
    record = table.layers[layer]
    if layer == 0:
        y = _read(y, int(record["inputs"]))
    y = clipped(products.sums(y, layer), record["lower"], record["upper"])
    alive = jnp.any(y != 0, axis=-1)
    return y, alive, jnp.sum(alive, dtype=jnp.int32).reshape(1)


def _read(y0: jax.Array, inputs: int) -> jax.Array:
    """Features as numbers, finite ones but for NaN: an infinite one would be NaN where a weight is 0."""
    y = primitives.unpack(y0, inputs)
    return jnp.clip(y, -_LARGEST, _LARGEST) if y0.dtype == jnp.float32 else y
