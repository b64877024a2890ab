"""Matrix Market files (math.nist.gov/MatrixMarket/formats.html).

Not through `scipy.io.mmread`: as of SciPy 1.17, a letter after a number (``-2e-3p``) ends it with a segmentation fault.
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax.io.files import load_text, reading

_MIRRORED = {"general": 0.0, "symmetric": 1.0, "skew-symmetric": -1.0}
"""What a value is multiplied by where it stands a second time, rows and columns exchanged; 0: it does not."""
_FIELDS = ("real", "integer", "pattern")


def read_matrix_market(plain: Path, name: str) -> Any:
    """Reads a Matrix Market file that is not packed.

    Args:
        plain: The file.
        name: What to call it in messages.

    Returns:
        A SciPy coo_array, float64; a float64 array where the file holds a dense matrix. A pattern has weights of one.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is malformed, or complex.
    """
    with (
        plain.open("rb") as file,
        reading(name, "a Matrix Market file", "write it with scipy.io.mmwrite, or fetch it again"),
    ):
        form, field, symmetry = _read_banner(file)
        *shape, entries = _read_sizes(file, 3 if form == "coordinate" else 2)
        if form == "array":
            return _read_dense(file, (*shape, entries), symmetry)
        return _read_coordinates(file, tuple(shape), entries, field, symmetry)


def _read_banner(file: BinaryIO) -> tuple[str, str, str]:
    words = file.readline(200).decode("ascii", errors="replace").lower().split()
    if len(words) != 5 or words[:2] != ["%%matrixmarket", "matrix"] or words[2] not in ("coordinate", "array"):
        raise ValueError("its first line is not %%MatrixMarket matrix and a form, such as coordinate real general")
    form, field, symmetry = words[2:]
    if field not in _FIELDS or symmetry not in _MIRRORED:
        raise ValueError(f"it is {field} {symmetry}, and only real, integer and pattern matrices are weights")
    return form, field, symmetry


def _read_sizes(file: BinaryIO, count: int) -> list[int]:
    line = b"%"
    while line.startswith(b"%") or line.isspace():
        line = file.readline()
    words = line.split()
    if len(words) != count or not all(word.isdigit() for word in words):
        raise ValueError(f"{count} sizes should follow the comments, found {line[:60].decode(errors='replace')!r}")
    return [int(word) for word in words]


def _read_dense(file: BinaryIO, shape: tuple[int, ...], symmetry: str) -> np.ndarray:
    if symmetry != "general":
        raise ValueError(f"dense and {symmetry}, which is not read")
    values = _table(file, [("value", np.float64)], shape[0] * shape[1])["value"]
    return values.reshape(shape, order="F")


def _read_coordinates(file: BinaryIO, shape: tuple[int, ...], entries: int, field: str, symmetry: str) -> Any:
    scipy_sparse = require("scipy.sparse", extra="data", purpose="reading a Matrix Market file")
    columns: list[Any] = [("row", np.int64), ("column", np.int64), ("value", np.float64)]
    table = _table(file, columns[: 2 if field == "pattern" else 3], entries)
    row, column = table["row"], table["column"]
    values = np.ones(entries) if field == "pattern" else table["value"]
    for index, size, what in ((row, shape[0], "row"), (column, shape[1], "column")):
        wrong = (index < 1) | (index > size)
        if wrong.any():
            raise ValueError(f"entry {int(np.argmax(wrong)) + 1} names {what} {index[wrong][0]} of {size}")
    row, column = row - 1, column - 1
    if factor := _MIRRORED[symmetry]:
        mirrored = row != column
        row, column = np.append(row, column[mirrored]), np.append(column, row[mirrored])
        values = np.append(values, factor * values[mirrored])
    return scipy_sparse.coo_array((values, (row, column)), shape=shape)


def _table(file: BinaryIO, columns: list[Any], rows: int) -> np.ndarray:
    table = load_text(file, dtype=np.dtype(columns), comments="%", ndmin=1)
    if len(table) != rows:
        raise ValueError(f"it announces {rows} entries and holds {len(table)}")
    return table
