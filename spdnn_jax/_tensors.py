"""Files of tensors with checksums: safetensors, which hold a SHA-256 of every part of their content.

A file of one kind: its metadata names the kind, and hold the digest of everything but the tensors; the tensor "digests"
has a row for each part, in an order that the kind defines. So a part can be checked by itself, as it is read.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from spdnn_jax._extras import require

_DIGESTS = "digests"
_DIGEST = "sha256"
_FORMAT = "format"
_HEADER_BYTES = 4096
_HEADER_BYTES_PER_TENSOR = 128
_CODES = {"int64": "I64", "int32": "I32", "uint32": "U32", "uint16": "U16", "uint8": "U8", "float32": "F32"}


def digest(*arrays: np.ndarray) -> bytes:
    """The SHA-256 of arrays: their dtypes, shapes and content."""
    result = hashlib.sha256()
    for array in arrays:
        result.update(f"{array.dtype.str}{array.shape}".encode())
        result.update(np.ascontiguousarray(array).data)
    return result.digest()


def _digest_of_header(metadata: dict[str, str], digests: np.ndarray) -> str:
    return hashlib.sha256(json.dumps(sorted(metadata.items())).encode() + digests.tobytes()).hexdigest()


class TensorWriter:
    """Writes a file tensor by tensor: what fits no memory can be written as it comes.

    Room for the header is kept at the front, and the format lets it be padded with spaces.
    """

    def __init__(self, file: BinaryIO, kind: str, tensors: int) -> None:
        """Begins a file.

        Args:
            file: Writable and seekable, empty.
            kind: What the file is, and which version of it.
            tensors: How many tensors there will be, at most.
        """
        self._file, self._kind = file, kind
        self._room = _HEADER_BYTES + _HEADER_BYTES_PER_TENSOR * (tensors + 1)
        self._header: dict[str, Any] = {}
        self._offset = 0
        file.seek(8 + self._room)

    def add(self, name: str, array: np.ndarray) -> None:
        """Writes a tensor."""
        self._header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [self._offset, self._offset + array.nbytes],
        }
        self._file.write(np.ascontiguousarray(array).data)
        self._offset += array.nbytes

    def finish(self, metadata: dict[str, str], digests: Sequence[bytes]) -> None:
        """Writes the digests of all parts, and the header.

        Args:
            metadata: More of it, by name.
            digests: What `digest` makes of each part.
        """
        rows = np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), -1)
        self.add(_DIGESTS, rows)
        metadata = {_FORMAT: self._kind, **metadata}
        header = {"__metadata__": {**metadata, _DIGEST: _digest_of_header(metadata, rows)}, **self._header}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        if len(encoded) > self._room:
            raise ValueError(f"the file's header needs {len(encoded):,} bytes, {self._room:,} were kept for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + encoded.ljust(self._room))


class TensorFile:
    """A file that `TensorWriter` wrote, memory-mapped, its header checked.

    Attributes:
        path: The file.
        metadata: What was given to `TensorWriter.finish`.
        parts: How many parts have a digest.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str, what: str, cure: str) -> None:
        """Opens the file.

        Args:
            path: The file.
            kind: As given to `TensorWriter`.
            what: What to call such a file in messages: "network file".
            cure: What to do where it is none: "write it with ...".

        Raises:
            OSError: The file cannot be read.
            ValueError: It is none of this kind, or its header is damaged; the message names it.
        """
        self.path = Path(path)
        self._what, self._cure = what, cure
        self.path.open("rb").close()  # says what is wrong with the path better than the library does
        safetensors = require("safetensors", extra="data", purpose=f"reading a {what}")
        try:
            self._file = safetensors.safe_open(os.fspath(path), framework="numpy")
            metadata = self._file.metadata() or {}
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise self.error(f"not a {what} ({error})") from None
        self._library_errors = (safetensors.SafetensorError, KeyError, TypeError, AttributeError, ValueError)
        if metadata.get(_FORMAT) != kind:
            raise self.error(f"not a {what} of this version, {kind!r}")
        expected = metadata.pop(_DIGEST, None)
        self._digests = self.tensor(_DIGESTS, (np.uint8,), 2)
        if (
            expected != _digest_of_header(metadata, self._digests)
            or self._digests.shape[1] != hashlib.sha256().digest_size
        ):
            raise self.error("the header is damaged")
        self.metadata = metadata
        self.parts = len(self._digests)

    def tensor(self, name: str, dtypes: tuple[type[np.generic], ...], ndim: int | tuple[int, ...]) -> np.ndarray:
        """Reads a tensor.

        Args:
            name: Its name.
            dtypes: The dtypes that it may have.
            ndim: How many axes it may have.

        Raises:
            ValueError: There is none, or it is none of these.
        """
        wanted = {_CODES[np.dtype(dtype).name] for dtype in dtypes}
        try:
            lies = self._file.get_slice(name)
            found, shape = lies.get_dtype(), tuple(lies.get_shape())
            if found in wanted and len(shape) in np.atleast_1d(ndim):
                return self._file.get_tensor(name)
        except self._library_errors as error:
            raise self.error(f"{name} cannot be read ({error})") from None
        raise self.error(f"{name} is {found} {shape}, which no {self._what} has")

    def map(self, name: str, dtype: type[np.generic]) -> np.ndarray:
        """Maps a vector into memory: only what is used is read."""
        try:
            shape = tuple(self._file.get_slice(name).get_shape())
            with self.path.open("rb") as file:
                size = int.from_bytes(file.read(8), "little")
                entry = json.loads(file.read(size))[name]
        except self._library_errors as error:
            raise self.error(f"{name} cannot be read ({error})") from None
        if entry["dtype"] != _CODES[np.dtype(dtype).name] or len(shape) != 1:
            raise self.error(f"{name} is {entry['dtype']} {shape}, not a vector")
        return np.memmap(self.path, dtype, "r", 8 + size + entry["data_offsets"][0], shape)

    def check(self, part: int, name: str, *arrays: np.ndarray) -> None:
        """Compares a part with its digest.

        Args:
            part: Its number, from 0.
            name: What to call it in messages.
            arrays: Its content.

        Raises:
            ValueError: They differ; the message names file and part.
        """
        if part >= self.parts or digest(*arrays) != self._digests[part].tobytes():
            raise self.error(f"{name} is damaged, its checksum differs")

    def error(self, wrong: str) -> ValueError:
        """What is to be raised where something is wrong with the file: its name, what is wrong, what to do."""
        return ValueError(f"{self.path}: {wrong}: {self._cure}")
