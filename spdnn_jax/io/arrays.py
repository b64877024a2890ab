"""Arrays in files, such as features, labels and biases: NumPy, IDX (MNIST's) and Matrix Market files, plain text."""

import math
import os
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spdnn_jax import checks
from spdnn_jax._extras import require
from spdnn_jax._files import unpacked
from spdnn_jax.io.files import FilePath, check_packed_size, expand, load_text, reading, unpacked_path
from spdnn_jax.io.matrix_market import read_matrix_market

_IDX_LARGEST = 1 << 24  # numbers of an entry
_DENSE_LARGEST = 1 << 26  # numbers of an array that a sparse file stands for, whatever it holds ...
_DENSE_RATIO = 1000  # ... and, for each of its entries, beyond that
_IDX_PIECE = 1 << 16  # bytes read at a time
_NUMPY_ERRORS = (
    *(SyntaxError, tokenize.TokenError, TypeError, KeyError, struct.error),  # of a header
    *(zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError),  # of a zip archive
)
_IDX_DTYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_array(path: FilePath, name: str | None = None) -> np.ndarray:
    """Reads an array from a file; what it is, gzipped or not, is told by its first bytes.

    Args:
        path: A NumPy ``.npy`` file, or ``.npz`` with one array; a SciPy ``.npz`` file; an IDX file; a Matrix Market
            file; or text, a row a line, numbers with blanks, tabs or commas between.
        name: What to call the file in messages; by default, its path.

    Returns:
        The array, in the file's shape and dtype. A sparse matrix comes as a dense one; text as float64, one number a
        line as a vector.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is corrupt or of no such kind; the message names it.
    """
    (path,) = expand([path])
    name = name or str(path)
    with unpacked(path) as file:
        head = file.read(4)
    if head[:2] == b"\0\0":
        return read_idx(path, name)
    with unpacked_path(path) as plain:
        if head == b"\x93NUM":
            with reading(name, "a NumPy file", "write it with numpy.save", *_NUMPY_ERRORS):
                return _numbers(np.load(plain, allow_pickle=False))
        if head[:2] == b"PK":
            return _read_npz(plain, name)
        if head[:2] == b"%%":
            return _dense(read_matrix_market(plain, name), name)
        with reading(name, "a table of numbers", "write it with numpy.savetxt, or as a NumPy or IDX file"):
            return _read_text(plain)


def read_vector(path: FilePath, name: str | None = None) -> np.ndarray:
    """Reads one axis of numbers, such as labels or biases; arguments and errors as for `read_array`.

    Raises:
        OSError: The file cannot be read.
        ValueError: As for `read_array`, or the array is no vector.
    """
    array = read_array(path, name)
    if array.size != max(array.shape, default=1):
        raise ValueError(f"{name or path}: expected one row or column of numbers, found shape {array.shape}")
    return array.reshape(-1)


def read_idx(path: FilePath, name: str | None = None) -> np.ndarray:
    """Reads an IDX file, plain or gzipped (format: yann.lecun.com/exdb/mnist), and no more of it than it announces.

    Args:
        path: The file.
        name: What to call it in messages; by default, its path.

    Returns:
        The array, in the file's shape and in this machine's byte order; uint8 (images, rows, columns) for images.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is corrupt or no IDX file.
    """
    name = name or os.fspath(path)
    with unpacked(path) as file:
        magic = file.read(4)
        axes = magic[3] if len(magic) == 4 else 0
        sizes = np.frombuffer(file.read(4 * axes)[: 4 * axes], ">u1")
        if not axes or magic[:2] != b"\0\0" or magic[2] not in _IDX_DTYPES or sizes.size < 4 * axes:
            raise ValueError(f"{name}: not an IDX file: it does not begin as one")
        dtype = np.dtype(_IDX_DTYPES[magic[2]])
        entries, *shape = (int(size) for size in sizes.view(">u4"))
        if not 0 < math.prod(shape) <= _IDX_LARGEST:
            text = " x ".join(map(str, shape))
            raise ValueError(f"{name}: announces entries of {text} numbers: not an IDX file, or corrupt")
        entry_bytes = math.prod(shape) * dtype.itemsize
        content = _read(file, entries * entry_bytes + 1)  # what is there, whatever the header says
    if len(content) != entries * entry_bytes:
        held = f"{'more than ' if len(content) > entries * entry_bytes else ''}{len(content) // entry_bytes:,}"
        raise ValueError(
            f"{name}: announces {entries:,} entries, but is cut short or too long (it holds {held}): fetch it again"
        )
    return np.frombuffer(content, dtype).reshape(entries, *shape).astype(dtype.newbyteorder("="), copy=False)


def _read(file: BinaryIO, size: int) -> bytearray:
    """Up to so many bytes, in pieces: a file that announces more than it has must not take the memory for it."""
    content = bytearray()
    while len(content) < size and (part := file.read(min(_IDX_PIECE, size - len(content)))):
        content += part
    return content


def read_scipy(plain: Path, name: str) -> Any:
    """A SciPy sparse matrix from an ``.npz`` file that is not packed, in the format it was saved in.

    Raises:
        ValueError: It is malformed; the message calls it by `name`.
    """
    scipy_sparse = require("scipy.sparse", extra="data", purpose="reading a SciPy file")
    with (
        plain.open("rb") as file,
        reading(name, "a sparse matrix of SciPy", "write it with scipy.sparse.save_npz", *_NUMPY_ERRORS),
    ):
        check_packed_size(plain)
        matrix = scipy_sparse.load_npz(file)
        checks.scipy_indices(matrix)
        return matrix


def _read_npz(plain: Path, name: str) -> np.ndarray:
    with reading(name, "a NumPy file", "write it with numpy.savez", *_NUMPY_ERRORS):
        check_packed_size(plain)
        with np.load(plain) as arrays:
            if len(arrays.files) == 1:
                return _numbers(arrays[arrays.files[0]])
    return _dense(read_scipy(plain, name), name)


def _numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "?biufc":
        raise ValueError(f"it holds {array.dtype}, no numbers")
    return array


def _dense(matrix: Any, name: str) -> np.ndarray:
    if isinstance(matrix, np.ndarray):
        return matrix
    numbers = math.prod(matrix.shape)
    if numbers > max(_DENSE_LARGEST, _DENSE_RATIO * matrix.nnz):
        sizes = " x ".join(f"{size:,}" for size in matrix.shape)
        raise ValueError(
            f"{name}: a sparse matrix of {sizes} with {matrix.nnz:,} entries, too large and empty to be read as an "
            "array: check the file's sizes"
        )
    return matrix.toarray()


def _read_text(plain: Path) -> np.ndarray:
    with plain.open(encoding="utf-8", errors="replace") as file:
        comma = "," if "," in file.readline() else None
        file.seek(0)
        array = load_text(file, delimiter=comma, ndmin=2)
    if not array.size:
        raise ValueError("it is empty")
    return array[:, 0] if array.shape[1] == 1 else array
