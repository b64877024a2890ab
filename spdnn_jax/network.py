"""Sparse layers and networks: frozen pytrees, built from SciPy, BCOO, BCSR or dense matrices; validation; saving."""

import dataclasses
import functools
import json
import operator
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from spdnn_jax import checks
from spdnn_jax._extras import require
from spdnn_jax._files import replacing
from spdnn_jax._tensors import TensorFile, TensorWriter, digest
from spdnn_jax.activation import Activation, Clip, paired, resolve

if TYPE_CHECKING:
    import scipy.sparse
    from jax.experimental import sparse

Array = jax.Array | np.ndarray
Duplicates = Literal["sum", "refuse"]


@functools.partial(jax.tree_util.register_dataclass, data_fields=["indptr", "outputs", "edges"], meta_fields=[])
@dataclass(frozen=True, eq=False)
class TransposedIndex:
    """The edges of a layer once more, compressed by input neuron: what a derivative reads.

    Attributes:
        indptr: int32 (inputs + 1,): the edges of input neuron i are indptr[i] .. indptr[i + 1] of the two that follow.
        outputs: int32 (edges,): the output neuron of each edge, ascending inside an input.
        edges: int32 (edges,): the number of each edge in the layer.
    """

    indptr: Array
    outputs: Array
    edges: Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["indptr", "indices", "values", "bias", "transposed"],
    meta_fields=["inputs"],
)
@dataclass(frozen=True, eq=False)
class SparseLayer:
    """One layer: its edges in rows compressed by output neuron, and its bias.

    A pytree; the constructor stores what it is given, so that JAX can rebuild a layer around whatever it puts in the
    place of arrays. Build layers with `from_scipy`, `from_bcoo` or `from_dense`, which put them on the default device;
    one built from raw arrays, of these dtypes or of others that convert, is looked at where it is used.

    Attributes:
        indptr: int32 (outputs + 1,): the edges of output neuron j are indptr[j] .. indptr[j + 1]. From 2^31 edges on
            int64, on the host.
        indices: int32 (edges,): the input neuron of each edge, ascending and distinct inside an output.
        values: float32 (edges,): the weights; or (), one weight for all edges.
        bias: float32 (outputs,), or (), one for all outputs.
        inputs: Number of input neurons.
        transposed: The index that derivatives read, from `with_transposed`; None: each of them works it out anew.
    """

    indptr: Array
    indices: Array
    values: Array
    bias: Array
    inputs: int
    transposed: TransposedIndex | None = None

    @property
    def outputs(self) -> int:
        """Number of output neurons."""
        return self.indptr.shape[0] - 1

    @property
    def edges(self) -> int:
        """Number of stored edges."""
        return self.indices.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(inputs, outputs)."""
        return self.inputs, self.outputs

    @classmethod
    def from_scipy(
        cls,
        matrix: Any,
        bias: Any = 0.0,
        duplicates: Duplicates = "sum",
    ) -> "SparseLayer":
        """A layer from a SciPy sparse matrix in any format.

        Args:
            matrix: scipy.sparse array or matrix, weights of shape (inputs, outputs). Explicit zeros are kept as edges.
            bias: A number, or one for each output; None for none.
            duplicates: What to do where an edge is stored twice: ``"sum"`` the weights, or ``"refuse"``.

        Raises:
            ValueError: It is no SciPy matrix or its indices are malformed, a weight or bias is not finite or overflows
                float32, the bias has another length, or an edge is stored twice and duplicates are refused.
        """
        if not checks.is_scipy(matrix):
            _refuse("from_scipy", "a SciPy sparse matrix", matrix)
        checks.scipy_indices(matrix)
        coordinates = (matrix.tocsc() if matrix.format == "csr" else matrix).tocoo(copy=False)  # sorted by counting
        return cls._from_edges(coordinates.row, coordinates.col, coordinates.data, matrix.shape, bias, duplicates)

    @classmethod
    def from_bcoo(
        cls, matrix: "sparse.BCOO | sparse.BCSR", bias: Any = 0.0, duplicates: Duplicates = "sum"
    ) -> "SparseLayer":
        """A layer from a JAX sparse matrix, BCOO or BCSR, of shape (inputs, outputs) without batch or dense axes.

        Args:
            matrix: The weights. Entries that pad (indices out of bounds) are left out, as JAX does.
            bias: A number, or one for each output; None for none.
            duplicates: As for `from_scipy`.

        Raises:
            ValueError: As for `from_scipy`, or the matrix has batch or dense axes.
        """
        if not checks.is_bcoo(matrix):
            _refuse("from_bcoo", "a BCOO or BCSR matrix", matrix)
        if checks.is_bcsr(matrix):
            matrix = matrix.to_bcoo()
        if matrix.n_batch or matrix.n_dense or matrix.ndim != 2:
            raise ValueError(f"the weights must be a plain sparse matrix, got {matrix}: remove batch and dense axes")
        indices, values = checks.on_host("the indices", matrix.indices), checks.on_host("the weights", matrix.data)
        inside = (indices < np.asarray(matrix.shape)).all(axis=1)
        row, column = indices[inside].T
        return cls._from_edges(row, column, values[inside], matrix.shape, bias, duplicates)

    @classmethod
    def from_dense(cls, matrix: Any, bias: Any = 0.0) -> "SparseLayer":
        """A layer from a dense matrix of shape (inputs, outputs); its zeros are no edges.

        Raises:
            ValueError: It is no dense matrix, a weight or bias is not finite or overflows float32, or the bias has
                another length.
        """
        if checks.is_scipy(matrix) or checks.is_bcoo(matrix) or isinstance(matrix, SparseLayer | SparseNetwork):
            _refuse("from_dense", "a dense matrix", matrix)
        dense = np.asarray(checks.on_host("the weights", matrix))
        if dense.ndim != 2:
            raise ValueError(f"the weights must be a matrix (inputs, outputs), got shape {dense.shape}")
        row, column = np.nonzero(dense)
        return cls._from_edges(row, column, dense[row, column], dense.shape, bias, "refuse")

    @classmethod
    def _from_edges(
        cls, row: Any, column: Any, values: Any, shape: tuple[int, ...], bias: Any, duplicates: Duplicates
    ) -> "SparseLayer":
        if duplicates not in ("sum", "refuse"):
            raise ValueError(f"duplicates must be 'sum' or 'refuse', got {duplicates!r}")
        if len(shape) != 2:
            raise ValueError(f"the weights must be a matrix (inputs, outputs), got shape {tuple(shape)}")
        inputs, outputs = (checks.count("the number of neurons", size) for size in shape)
        if not jnp.isdtype(values.dtype, ("real floating", "integral", "bool")):
            raise ValueError(f"the weights must be real numbers, got {values.dtype}")
        if min(row.min(initial=0), column.min(initial=0)) < 0:
            raise ValueError("an edge names a negative neuron: neurons count from 0")
        is_small = max(row.max(initial=0), column.max(initial=0)) <= checks.INT32
        row, column = (np.asarray(index, np.int32 if is_small else np.int64) for index in (row, column))
        if values.dtype != np.float32:
            values = np.asarray(values, np.float64)
        if not _ascends(row, column):
            order = np.lexsort((row, column))
            row, column, values = row[order], column[order], values[order]
            del order
        first = np.ones(row.size, bool)
        first[1:] = row[1:] != row[:-1]
        first[1:] |= column[1:] != column[:-1]
        if not first.all():
            if duplicates == "refuse":
                twice = int(np.argmin(first))
                raise ValueError(
                    f"the edge from input {row[twice]} to output {column[twice]} is stored twice: "
                    "pass duplicates='sum' to add the weights up"
                )
            values = np.add.reduceat(values, np.flatnonzero(first), dtype=np.float64)
            row, column = row[first], column[first]
        indptr = np.zeros(outputs + 1, np.int64)
        np.cumsum(np.bincount(column, minlength=outputs), out=indptr[1:])
        bias = checks.on_host("the bias", 0.0 if bias is None else bias)
        return cls(indptr, row, values, bias, inputs).validate().converted()._on_device()

    def validate(self, name: str = "the layer") -> "SparseLayer":
        """Checks the arrays on the host.

        Args:
            name: What to call the layer in messages.

        Returns:
            The layer itself.

        Raises:
            ValueError: Shapes or kinds of numbers do not fit, an index is out of range, indices are not ascending, or a
                weight or bias is not finite.
        """
        layer = self.converted(name)
        indptr, indices, values, bias = (
            np.asarray(checks.on_host(name, array)) for array in (layer.indptr, layer.indices, layer.values, layer.bias)
        )
        rises = np.diff(indices) > 0
        starts = indptr[1:-1]
        rises[starts[(starts > 0) & (starts < indices.size)] - 1] = True
        if not rises.all():
            row = int(np.searchsorted(indptr, np.argmin(rises), side="right")) - 1
            raise ValueError(f"{name}: the inputs of output {row} are not ascending and distinct")
        for array, what in ((values, "weight"), (bias, "bias")):
            if not np.isfinite(array).all():
                position = int(np.argmin(np.isfinite(array.reshape(-1))))
                raise ValueError(f"{name}: {what} {position} is {array.reshape(-1)[position]}, which is not finite")
        return self

    def converted(self, name: str = "the layer", *, indices_too: bool = True) -> "SparseLayer":
        """The layer with arrays as the back ends take them, each where it was; what they hold is looked at before.

        Of traced arrays, kinds and shapes alone can be looked at.

        Args:
            name: What to call the layer in messages.
            indices_too: Whether to look for edges from inputs that do not exist; the builder of plans does so itself.

        Raises:
            ValueError: An array is of another kind or shape or out of range, `indptr` does not rise to the number of
                edges, or an edge names an input that does not exist.
        """
        inputs = checks.count(f"{name}: inputs", self.inputs)
        indices = checks.array(f"{name}: indices", self.indices, np.int32, [(None,)])
        edges = indices.shape[0]
        pointers = np.int32 if edges <= checks.INT32 else np.int64
        indptr = checks.array(f"{name}: indptr", self.indptr, pointers, [(None,)])
        if indptr.shape[0] == 0:
            raise ValueError(f"{name}: indptr must have shape (outputs + 1,), got (0,)")
        checks.once(indptr, edges, functools.partial(_check_rises, name))
        values = checks.array(f"{name}: values", self.values, np.float32, [(), (edges,)])
        bias = checks.array(f"{name}: bias", self.bias, np.float32, [(), (indptr.shape[0] - 1,)])
        if indices_too:
            checks.once(indices, inputs, functools.partial(_check_below, name))
        return dataclasses.replace(self, indptr=indptr, indices=indices, values=values, bias=bias, inputs=inputs)

    def _on_device(self) -> "SparseLayer":
        arrays = {field: getattr(self, field) for field in _FIELDS}
        if self.edges > checks.INT32:  # JAX would cut 64-bit row pointers
            del arrays["indptr"]
        return dataclasses.replace(self, **{field: checks.on_device(array) for field, array in arrays.items()})

    def with_transposed(self) -> "SparseLayer":
        """The layer with the index that derivatives read, worked out once, on the host.

        It takes 8 bytes an edge, and stays right whatever becomes of values and bias.
        """
        indptr, indices = np.asarray(self.indptr), np.asarray(self.indices)
        edges = np.argsort(indices, kind="stable").astype(np.int32)
        starts = np.searchsorted(indices[edges], np.arange(self.inputs + 1)).astype(np.int32)
        rows = np.repeat(np.arange(self.outputs, dtype=np.int32), np.diff(indptr))
        index = TransposedIndex(*(checks.on_device(array) for array in (starts, rows[edges], edges)))
        return dataclasses.replace(self, transposed=index)

    def to_scipy(self) -> "scipy.sparse.csc_array":
        """The weights as a SciPy matrix, float32, shape (inputs, outputs)."""
        scipy_sparse = require("scipy.sparse", extra="data", purpose="converting a layer to SciPy")
        values = np.broadcast_to(np.asarray(self.values, np.float32), (self.edges,))
        return scipy_sparse.csc_array((values, np.asarray(self.indices), np.asarray(self.indptr)), shape=self.shape)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False, init=False)
class SparseNetwork:
    """Layers in order, each followed by its activation.

    A pytree of its layers; the activations are static.

    Attributes:
        layers: The layers; each has as many inputs as the one before has outputs.
        activation: The activation of each layer.
    """

    layers: tuple[SparseLayer, ...]
    activation: tuple[Clip, ...]

    def __init__(
        self,
        layers: Iterable[SparseLayer],
        activation: Clip | Iterable[Clip] | None = None,
        *,
        cap: float | EllipsisType | None = ...,
    ) -> None:
        """A network.

        Args:
            layers: The layers in order. A SciPy matrix (inputs, outputs) is taken as a layer without bias.
            activation: One for all layers, or one a layer; by default the challenge's ``Clip.relu(32)``.
            cap: Short for ``activation=Clip.relu(cap)``.

        Raises:
            ValueError: There is no layer, one of them is none, two do not fit, or the activations are not as many, or
                are none.
        """
        pairs = tuple(paired(as_layers(layers), resolve(activation, cap)))
        if not pairs:
            raise ValueError("a network needs at least one layer")
        self._hold(tuple(layer for layer, _ in pairs), tuple(clip for _, clip in pairs))
        for number, (before, after) in enumerate(zip(self.layers, self.layers[1:], strict=False), start=2):
            _check_chain(number, before.outputs, after)

    def _hold(self, layers: Any, activation: tuple[Clip, ...]) -> None:
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "activation", activation)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any]], tuple[Clip, ...]]:
        """For JAX: the layers are children, the activations static."""
        return ((jax.tree_util.GetAttrKey("layers"), self.layers),), self.activation

    @classmethod
    def tree_unflatten(cls, activation: tuple[Clip, ...], children: tuple[Any]) -> "SparseNetwork":
        """For JAX: the reverse of flattening, around whatever JAX puts in the place of arrays."""
        network = object.__new__(cls)
        network._hold(children[0], activation)
        return network

    @property
    def inputs(self) -> int:
        """Number of input neurons."""
        return self.layers[0].inputs

    @property
    def outputs(self) -> int:
        """Number of output neurons."""
        return self.layers[-1].outputs

    @property
    def edges(self) -> int:
        """Stored edges of all layers."""
        return sum(layer.edges for layer in self.layers)

    def validate(self) -> "SparseNetwork":
        """Checks every layer's arrays on the host; returns the network itself.

        Raises:
            ValueError: As `SparseLayer.validate`; the message names the layer, counted from 1.
        """
        for number, layer in enumerate(self.layers, start=1):
            layer.validate(f"layer {number}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the network to one safetensors file.

        Raises:
            OSError: The file cannot be written; nothing is left behind.
        """
        save_layers(path, self.layers, len(self.layers), self.activation)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "SparseNetwork":
        """Reads a network that `save` or ``spdnn convert`` wrote.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no network file of this version, or a damaged one; the message names file and layer.
        """
        file = NetworkFile(path)
        layers = tuple(file)
        try:
            return cls(layers, file.activation).validate()
        except ValueError as error:
            raise file.named(error) from None


def as_layer(given: Any, name: str = "the layer") -> SparseLayer:
    """Something given as a layer: one, or a SciPy matrix, which is taken as one without bias.

    Raises:
        ValueError: It is neither, or its indptr is no vector; the message names the builder that takes it.
    """
    if checks.is_scipy(given):
        return SparseLayer.from_scipy(given)
    if not isinstance(given, SparseLayer):
        cure = f"build it with {checks.constructor_for(given)}"
        if isinstance(given, SparseNetwork):
            cure = "pass one of its layers, or call spdnn_jax.apply"
        raise ValueError(f"{name} must be a SparseLayer or a SciPy matrix, got {checks.kind_of(given)}: {cure}")
    checks.array(f"{name}: indptr", given.indptr, shapes=[(None,)])
    checks.array(f"{name}: indices", given.indices, shapes=[(None,)])
    return given


def as_layers(given: Any) -> Iterator[SparseLayer]:
    """Each of the layers given, as `as_layer`, when it is asked for.

    Raises:
        ValueError: They are no iterable of layers.
    """
    if not isinstance(given, Iterable) or isinstance(given, str | bytes | dict) or checks.is_scipy(given):
        raise ValueError(f"the layers must come as a list or another iterable, got {checks.kind_of(given)}")
    return (as_layer(layer, f"layer {number}") for number, layer in enumerate(given, start=1))


def as_network(given: Any) -> SparseNetwork:
    """A network, looked at.

    Raises:
        ValueError: It is none.
    """
    if not isinstance(given, SparseNetwork):
        raise ValueError(
            f"a SparseNetwork is expected, got {checks.kind_of(given)}: build SparseNetwork(layers, activation)"
        )
    return given


def _refuse(builder: str, what: str, given: Any) -> NoReturn:
    raise ValueError(
        f"SparseLayer.{builder} takes {what}, got {checks.kind_of(given)}"
        + ("" if isinstance(given, SparseLayer) else f": use {checks.constructor_for(given)}")
    )


def _ascends(row: np.ndarray, column: np.ndarray) -> bool:
    """Whether edges stand by column, and by row inside a column."""
    rises = row[1:] >= row[:-1]
    rises &= column[1:] == column[:-1]
    rises |= column[1:] > column[:-1]
    return bool(rises.all())


def _check_rises(name: str, indptr: np.ndarray, edges: int) -> None:
    if indptr[0] != 0 or indptr[-1] != edges or (np.diff(indptr) < 0).any():
        raise ValueError(f"{name}: indptr must rise from 0 to the number of edges, {edges}")


def _check_below(name: str, indices: np.ndarray, inputs: int) -> None:
    if indices.size and not (indices.min() >= 0 and indices.max() < inputs):
        wrong = indices[(indices < 0) | (indices >= inputs)][0]
        raise ValueError(f"{name}: an edge names input {wrong}, but there are {inputs} inputs, from 0 on")


def _check_chain(number: int, outputs_before: int, layer: SparseLayer) -> None:
    if layer.inputs != outputs_before:
        raise ValueError(
            f"layer {number} has {layer.inputs} inputs, but layer {number - 1} has {outputs_before} outputs"
        )


# --- files ------------------------------------------------------------------------------------------------------------
#
# A network file holds per layer the tensors "<number>.indptr", ".indices", ".values" and ".bias", numbers from 1, and a
# checksum of the four. It is written layer by layer, for the largest challenge network (4 G edges) fits no memory.

_FIELDS = ("indptr", "indices", "values", "bias")
_DTYPES = {"indptr": (np.int64,), "indices": (np.uint16, np.int32), "values": (np.float32,), "bias": (np.float32,)}
_AXES = {"indptr": 1, "indices": 1, "values": (0, 1), "bias": (0, 1)}
_KIND = "spdnn_jax network 2"


def save_layers(
    path: str | os.PathLike[str], layers: Iterable[SparseLayer], count: int, activation: Activation
) -> None:
    """Writes layers to one safetensors file, one at a time.

    Args:
        path: The file, replaced at the end in one step.
        layers: The layers in order.
        count: How many there are.
        activation: One for all layers, or one a layer.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
        ValueError: There are more or fewer layers than announced, a layer is malformed, or does not fit the one before.
    """
    inputs: list[int] = []
    bounds: list[list[float | None]] = []
    digests: list[bytes] = []
    outputs = 0
    with replacing(path) as file:
        writer = TensorWriter(file, _KIND, tensors=len(_FIELDS) * count)
        for number, (layer, clip) in enumerate(paired(layers, activation), start=1):
            layer.validate(f"layer {number}")  # before indices are narrowed, which would wrap wrong ones into range
            if number > 1:
                _check_chain(number, outputs, layer)
            outputs = layer.outputs
            inputs.append(int(layer.inputs))
            bounds.append([None if np.isinf(bound) else bound for bound in (clip.lower, clip.upper)])
            arrays = [np.asarray(getattr(layer, field), _stored_dtype(field, layer.inputs)) for field in _FIELDS]
            for field, array in zip(_FIELDS, arrays, strict=True):
                writer.add(f"{number}.{field}", array)
            digests.append(digest(*arrays))
        if len(inputs) != count:
            raise ValueError(f"{len(inputs)} layers came where {count} were announced")
        writer.finish({"inputs": json.dumps(inputs), "activation": json.dumps(bounds)}, digests)


def _stored_dtype(field: str, inputs: int) -> type[np.generic]:
    if field == "indices":
        return np.uint16 if inputs <= np.iinfo(np.uint16).max + 1 else np.int32
    return _DTYPES[field][0]


class NetworkFile(Iterable[SparseLayer]):
    """A network file: iterating reads the layers one at a time, and compares each with its checksum.

    Attributes:
        activation: The activation of each layer.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is no network file of this version, or its header is damaged.
        """
        self._file = TensorFile(path, _KIND, "network file", "write it again with spdnn convert or SparseNetwork.save")
        try:
            self._inputs = [operator.index(width) for width in json.loads(self._file.metadata["inputs"])]
            self.activation = tuple(
                Clip(-np.inf if lower is None else lower, np.inf if upper is None else upper)
                for lower, upper in json.loads(self._file.metadata["activation"])
            )
        except (KeyError, TypeError, ValueError, RecursionError) as error:
            raise self._file.error(f"its inputs or activations cannot be read ({error})") from None
        if not 0 < len(self._inputs) == len(self.activation) == self._file.parts:
            raise self._file.error(
                f"{self._file.parts} layers have {len(self._inputs)} widths and {len(self.activation)} activations"
            )

    def __len__(self) -> int:
        return len(self._inputs)

    def __iter__(self) -> Iterator[SparseLayer]:
        for number, inputs in enumerate(self._inputs, start=1):
            arrays: dict[str, Any] = {
                field: self._file.tensor(f"{number}.{field}", _DTYPES[field], _AXES[field]) for field in _FIELDS
            }
            self._file.check(number - 1, f"layer {number}", *arrays.values())
            arrays["indices"] = arrays["indices"].astype(np.int32, copy=False)
            yield SparseLayer(**arrays, inputs=inputs)

    def named(self, error: ValueError) -> ValueError:
        """The error with the file's name before it."""
        return self._file.error(str(error))


def as_arguments(layer: SparseLayer) -> tuple[jax.Array, ...]:
    """values, bias, indptr, indices and, where the layer has it, its transposed index, as `products.layer` takes them.

    Args:
        layer: From `SparseLayer.converted`.

    Raises:
        ValueError: The layer has 2^31 edges or more.
    """
    if layer.edges > checks.INT32:
        raise ValueError(f"a layer of {layer.edges} edges is too large for layer(): build a plan")
    arrays = [layer.values, layer.bias, layer.indptr, layer.indices]
    if layer.transposed is not None:
        arrays += [layer.transposed.indptr, layer.transposed.outputs, layer.transposed.edges]
    return tuple(jnp.asarray(array) for array in arrays)


def native_arrays(layer: SparseLayer, activation: Clip, number: int) -> dict[str, Any]:
    """A layer, counted from 1, as the native code takes it: contiguous vectors, one value or bias as a vector of one.

    Raises:
        ValueError: As `SparseLayer.converted`, or an array is traced. The native code looks at the rest.
    """
    name = f"layer {number}"
    layer = as_layer(layer, name).converted(name, indices_too=False)
    indptr, indices, values, bias = (checks.on_host(f"{name}: {field}", getattr(layer, field)) for field in _FIELDS)
    return {
        "inputs": layer.inputs,
        "indptr": np.ascontiguousarray(indptr, np.int64),
        "indices": np.ascontiguousarray(indices, np.int32),
        "values": np.ascontiguousarray(values, np.float32).reshape(-1),
        "bias": np.ascontiguousarray(bias, np.float32).reshape(-1),
        "lower": activation.lower,
        "upper": activation.upper,
    }
