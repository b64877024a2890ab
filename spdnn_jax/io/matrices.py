"""One layer's weights from one file: SciPy's ``.npz``, Matrix Market, or a table of edges."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax._files import unpacked
from spdnn_jax.io.arrays import read_scipy, read_vector
from spdnn_jax.io.files import unpacked_path
from spdnn_jax.io.kinds import kind_of
from spdnn_jax.io.matrix_market import read_matrix_market
from spdnn_jax.io.tables import Source, read_tables
from spdnn_jax.network import Duplicates, SparseLayer

_OUTPUTS_LARGEST = 1 << 24  # outputs of a layer, which take memory each, whatever the file holds ...
_OUTPUTS_RATIO = 1000  # ... and, for each of its edges, beyond that
_CURE = "check the file, or write the matrix with scipy.sparse.save_npz"


@dataclass(frozen=True)
class Matrix:
    """What a file says of the weights of a layer.

    Attributes:
        name: The file, and the tensor in it, for messages.
        row: Input neuron of each edge, from 0.
        column: Output neuron of each edge, from 0.
        values: Weight of each edge.
        shape: (inputs, outputs); None where the file does not say.
        bias: A number, or one for each output.
    """

    name: str
    row: np.ndarray
    column: np.ndarray
    values: np.ndarray
    shape: tuple[int | None, int | None]
    bias: Any = 0.0

    @classmethod
    def of(cls, name: str, weights: Any) -> "Matrix":
        """From a SciPy matrix, or a dense one, whose zeros are no edges.

        Raises:
            ValueError: A dense one has not two axes.
        """
        if isinstance(weights, np.ndarray):
            if weights.ndim != 2:
                raise ValueError(f"{name}: expected a matrix, found shape {weights.shape}")
            row, column = (index.astype(np.int32) for index in np.nonzero(weights))
            return cls(name, row, column, weights[row, column], weights.shape)
        coordinates = weights.tocoo(copy=False)
        return cls(name, coordinates.row, coordinates.col, coordinates.data, weights.shape)

    @property
    def least(self) -> tuple[int, int]:
        """(inputs, outputs): what the file says or, where it does not, what the edges need."""
        needed = (int(index.max(initial=-1)) + 1 for index in (self.row, self.column))
        inputs, outputs = (least if size is None else size for size, least in zip(self.shape, needed, strict=True))
        return inputs, outputs

    def transposed(self) -> "Matrix":
        """The matrix with inputs and outputs exchanged."""
        return dataclasses.replace(self, row=self.column, column=self.row, shape=self.shape[::-1])

    def with_bias(self, bias: Any) -> "Matrix":
        """The matrix with this bias, whose length is the number of outputs where the file does not say it."""
        bias = np.asarray(bias)
        inputs, outputs = self.shape
        return dataclasses.replace(
            self, bias=bias, shape=(inputs, bias.size if outputs is None and bias.ndim else outputs)
        )

    def with_shape(self, inputs: int, outputs: int) -> "Matrix":
        """The matrix with these sizes where its file names none.

        Raises:
            ValueError: An edge needs more.
        """
        known_inputs, known_outputs = self.shape
        sizes = (inputs if known_inputs is None else known_inputs, outputs if known_outputs is None else known_outputs)
        for what, index, size in zip(("input", "output"), (self.row, self.column), sizes, strict=True):
            if index.max(initial=-1) >= size:
                raise ValueError(f"{self.name}: an edge names {what} {index.max()}, but there are {size}, from 0 on")
        return dataclasses.replace(self, shape=sizes)

    def layer(self, duplicates: Duplicates) -> SparseLayer:
        """The layer; sizes that nobody named are what the edges need.

        Raises:
            ValueError: As `SparseLayer.from_scipy`; the message names the file.
        """
        scipy_sparse = require("scipy.sparse", extra="data", purpose="reading a network")
        outputs = self.least[1]
        if outputs > max(_OUTPUTS_LARGEST, _OUTPUTS_RATIO * self.row.size):
            raise ValueError(
                f"{self.name}: {outputs:,} outputs with {self.row.size:,} edges, too many and empty to be a layer: "
                "check the file's sizes and indices"
            )
        try:
            matrix = scipy_sparse.coo_array((self.values, (self.row, self.column)), shape=self.least)
            return SparseLayer.from_scipy(matrix, self.bias, duplicates)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None


def read_matrix(path: Path, *, index_base: int, transpose: bool, outputs: int | None) -> Matrix:
    """Reads the weights of one layer; what a file is, is told by its name or, where that says nothing, its first bytes.

    Args:
        path: The file, gzipped or not, as its first bytes say.
        index_base: What the indices of a table of edges count from: 0 or 1.
        transpose: Whether the file's matrix has shape (outputs, inputs).
        outputs: Number of output neurons, where it is known: what a list of weights without indices needs.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is malformed; the message names it.
    """
    name = str(path)
    with unpacked_path(path) as plain:
        kind = kind_of(path)
        if kind == "text":
            matrix = _read_text(plain, name, index_base, transpose, outputs)
        else:
            read = read_scipy if kind == "npz" else read_matrix_market
            matrix = Matrix.of(name, read(plain, name))
    return matrix.transposed() if transpose else matrix


def _read_text(plain: Path, name: str, index_base: int, transpose: bool, outputs: int | None) -> Matrix:
    """A table of edges; or a dense matrix, row by row, one weight a line."""
    with plain.open("rb") as file:
        if len(file.readline().split()) != 1:
            return _read_edges(plain, name, index_base)
    weights = read_vector(plain, name)
    if outputs is None or weights.size % outputs:
        known = "their number is not known" if outputs is None else f"there are {outputs} outputs"
        raise ValueError(
            f"{name}: {weights.size} weights without indices make no matrix where {known}: pass biases=, one an output"
        )
    return Matrix.of(name, weights.reshape((outputs, -1) if transpose else (-1, outputs)))


def _read_edges(plain: Path, name: str, index_base: int) -> Matrix:
    source = Source(name, lambda: unpacked(plain))
    row, column, values = map(np.concatenate, zip(*read_tables(source, _CURE), strict=True))
    for what, index in (("first", row), ("second", column)):
        if index.min() < index_base:
            line = int(np.argmax(index < index_base)) + 1
            cure = "pass index_base=0" if index.min() == 0 else _CURE
            raise ValueError(
                f"{name}, line {line}: the {what} neuron is {index[line - 1]}, but they count from {index_base}: {cure}"
            )
    return Matrix(name, row - index_base, column - index_base, values, (None, None))
