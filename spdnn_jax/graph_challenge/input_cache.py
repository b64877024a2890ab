"""Digits that were made before, kept in the user's cache folder: bits after a digest of them and of what they are."""

import contextlib
import hashlib
import importlib.metadata
import os
import tempfile
from pathlib import Path

import numpy as np

from spdnn_jax.graph_challenge import inputs

_DIGEST_BYTES = 32


def folder() -> Path:
    """Where inputs are kept: ``$XDG_CACHE_HOME/spdnn_jax``, or ``~/.cache/spdnn_jax``.

    Raises:
        RuntimeError: The user has no home.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "spdnn_jax"


def digits(
    neurons: int, count: int, seed: int = 0, progress: inputs.Progress | None = None, share: slice = inputs.ALL
) -> np.ndarray:
    """As `inputs.digits`, from the cache where it holds them.

    A file that is damaged, or of something else, is not used but made anew; where no file can be written, none is.
    """
    path = _path(neurons, count, seed)
    packed = _read(path, count, -(-neurons // 8)) if path is not None else None
    if packed is not None:
        return np.unpackbits(packed[share], axis=1, count=neurons)
    made = inputs.digits(neurons, count, seed, progress, share)
    if path is not None and len(made) == count:
        with contextlib.suppress(OSError):
            _write(path, np.packbits(made, axis=1))
    return made


def _path(neurons: int, count: int, seed: int) -> Path | None:
    """Names all that the bits depend on, our own code among it; None where there is no home, or no scikit-learn."""
    try:
        code = hashlib.blake2b(Path(str(inputs.__file__)).read_bytes(), digest_size=6).hexdigest()
        versions = f"numpy{np.__version__}-sklearn{importlib.metadata.version('scikit-learn')}"
        return folder() / f"digits-{neurons}x{count}-{seed}-{code}-{versions}.bits"
    except (RuntimeError, importlib.metadata.PackageNotFoundError):
        return None


def _read(path: Path, rows: int, row_bytes: int) -> np.ndarray | None:
    try:
        content = np.fromfile(path, np.uint8)
    except OSError:
        return None
    digest, bits = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    if bits.size != rows * row_bytes or digest.tobytes() != _digest(path.name, bits):
        return None
    return bits.reshape(rows, row_bytes)


def _write(path: Path, packed: np.ndarray) -> None:
    """Writes the file whole or not at all, whatever other processes do meanwhile."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".part-") as partial:
        file = Path(partial, path.name)
        with file.open("wb") as stream:
            stream.write(_digest(path.name, packed))
            packed.tofile(stream)
        file.replace(path)


def _digest(name: str, bits: np.ndarray) -> bytes:
    digest = hashlib.blake2b(name.encode(), digest_size=_DIGEST_BYTES)
    digest.update(np.ascontiguousarray(bits).data)
    return digest.digest()
