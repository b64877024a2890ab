"""Input features: handwritten digits that ship with scikit-learn, MNIST files, the official files, random ones.

All are uint8 arrays of shape (features, neurons) that hold 0 and 1; images are flattened column by column, as the
official ones are.
"""

import functools
import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from spdnn_jax._extras import require
from spdnn_jax._native import usable_cores
from spdnn_jax.io.arrays import read_idx

Progress = Callable[[int], None]
ALL = slice(None)
"""The share of a process that keeps all features."""

_CHUNK = 1000  # images drawn at a time
_CHUNK_PIXELS = 1 << 20  # pixels resized at a time: what bounds the memory of wide networks
_SAMPLED_PIXELS = 1 << 15  # pixels sampled at a time: what stays in a core's cache
_DIGITS_DENSITY = 0.10
_MNIST_THRESHOLD = 0.72 * 255


def random(neurons: int, count: int, density: float = 0.1, seed: int = 0, share: slice = ALL) -> np.ndarray:
    """Independent random features.

    Args:
        neurons: Width.
        count: Number of features.
        density: Share of ones.
        seed: Of the generator.
        share: Which of the features to keep, such as every second one; the others take no memory.

    Returns:
        uint8 (features kept, neurons) of 0 and 1.

    Raises:
        ValueError: count is not positive, or density is no share.
    """
    _check_count(count)
    if not 0 <= density <= 1:
        raise ValueError(f"density must lie between 0 and 1, got {density}")
    generator = np.random.default_rng(seed)
    kept = range(count)[share]
    result = np.empty((len(kept), neurons), np.uint8)
    for first in range(0, count, _CHUNK):
        chunk = range(first, min(first + _CHUNK, count))
        part = generator.random((len(chunk), neurons), np.float32) < density
        for number in chunk:
            if number in kept:
                result[kept.index(number)] = part[number - first]
    return result


# --- digits -----------------------------------------------------------------------------------------------------------


def digits(neurons: int, count: int, seed: int = 0, progress: Progress | None = None, share: slice = ALL) -> np.ndarray:
    """Real handwritten digits (scikit-learn's 1,797 images of 8 x 8), enlarged and varied to distinct features.

    Each feature is one of the images, turned, shifted, scaled and sheared a little at random, sampled at the network's
    resolution and thresholded, at one level for all, so that about a tenth of the pixels are ones.

    Args:
        neurons: Width, a square number.
        count: Number of features, all distinct.
        seed: Of the variations.
        progress: Called with the number of features made so far.
        share: Which of the features to keep; the others take no memory.

    Returns:
        uint8 (features kept, neurons) of 0 and 1.

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: neurons is not a square, count is not positive, or so many distinct images do not exist.
    """
    _check_count(count)
    side = _side(neurons)
    datasets = require("sklearn.datasets", extra="data", purpose="--inputs=digits")
    images = datasets.load_digits().images.astype(np.float32)
    generator = np.random.default_rng(seed)
    sample = _vary(images, generator, min(count, _CHUNK), side)
    threshold = np.quantile(sample, 1 - _DIGITS_DENSITY)
    kept = range(count)[share]
    result = np.empty((len(kept), neurons), np.uint8)
    seen: set[bytes] = set()
    filled = rejected = 0
    while filled < count:
        varied = _vary(images, generator, min(_CHUNK, count), side) > threshold
        for row in _flatten(varied):
            key = hashlib.blake2b(np.packbits(row).tobytes(), digest_size=16).digest()  # rows would fill memory
            if key in seen:
                rejected += 1
                continue
            seen.add(key)
            if filled in kept:
                result[kept.index(filled)] = row
            filled += 1
            if filled == count:
                break
        if rejected > 10 * count + 10 * _CHUNK:
            raise ValueError(f"no {count} distinct digits exist at {side} x {side} pixels: ask for fewer features")
        if progress is not None:
            progress(filled)
    return result


def _vary(images: np.ndarray, generator: np.random.Generator, count: int, side: int) -> np.ndarray:
    """Random affine views of random images, float32 (count, side, side), sampled bilinearly, on all cores."""
    angle = generator.uniform(-0.25, 0.25, count)
    scale = generator.uniform(0.85, 1.15, (2, count))
    shear = generator.uniform(-0.2, 0.2, count)
    shift = generator.uniform(-0.7, 0.7, (2, count, 1, 1))
    chosen = images[generator.integers(len(images), size=count)]
    size = images.shape[1]
    grid = (np.arange(side, dtype=np.float32) + 0.5) * (size / side) - size / 2
    cos, sin = np.cos(angle), np.sin(angle)

    def coordinate(from_y: np.ndarray, from_x: np.ndarray, offset: np.ndarray) -> np.ndarray:
        position = (from_y[:, None] * grid)[:, :, None] + (from_x[:, None] * grid)[:, None, :]
        position += offset
        position += (size - 1) / 2
        return position.astype(np.float32)

    def sample(part: slice) -> None:
        rows = coordinate((cos * scale[0])[part], ((sin + shear) * scale[0])[part], shift[0, part])
        columns = coordinate((-sin * scale[1])[part], (cos * scale[1])[part], shift[1, part])
        result[part] = _bilinear(chosen[part], rows, columns)

    result = np.empty((count, side, side), np.float32)
    step = max(1, _SAMPLED_PIXELS // (side * side))
    with ThreadPoolExecutor(usable_cores()) as pool:
        list(pool.map(sample, (slice(first, first + step) for first in range(0, count, step))))
    return result


def _bilinear(images: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1)))
    width = padded.shape[1]
    for positions in (rows, columns):
        positions += 1
        np.clip(positions, 0, width - 1.001, out=positions)
    top, left = rows.astype(np.intp), columns.astype(np.intp)
    down, right = rows - top, columns - left
    up, near = 1 - down, 1 - right
    corner = (np.arange(len(images)) * width * width)[:, None, None] + top * width + left

    def corners(offset: int) -> np.ndarray:
        return padded.ravel().take(corner + offset)

    upper = corners(0) * near + corners(1) * right
    lower = corners(width) * near + corners(width + 1) * right
    return upper * up + lower * down


# --- MNIST ------------------------------------------------------------------------------------------------------------


def mnist(
    directory: str | os.PathLike[str],
    neurons: int,
    count: int = 60000,
    progress: Progress | None = None,
    share: slice = ALL,
) -> np.ndarray:
    """MNIST training images in IDX form, resized as the challenge's were and thresholded.

    The official inputs are MNIST images; Fourier interpolation and a threshold of 0.72 of full scale come closest to
    them and reproduce 98% of the official categories.

    Args:
        directory: Holds ``train-images-idx3-ubyte``, plain or gzipped; or the layout of torchvision (``MNIST/raw``) or
            Kaggle, where the file lies in a folder of its own name.
        neurons: Width, a square number: 1024, 4096, 16384 or 65536 in the challenge.
        count: How many images, from the first on.
        progress: Called with the number of images resized so far.
        share: Which of these images to keep; the others are not resized.

    Returns:
        uint8 (images kept, neurons) of 0 and 1, in the file's order.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: It is corrupt, holds fewer images, or neurons is not a square.
    """
    _check_count(count)
    side = _side(neurons)
    path = find_images(directory)
    images = read_idx_images(path)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"{path}: images of {images.shape[1]} x {images.shape[2]} pixels are not square: not MNIST's")
    if count > len(images):
        raise ValueError(f"{directory} holds {len(images)} images, {count} were asked for: lower --features")
    images = images[:count][share]
    result = np.empty((len(images), neurons), np.uint8)
    step = max(1, _CHUNK_PIXELS // neurons)
    for first in range(0, len(images), step):
        part = images[first : first + step]
        result[first : first + len(part)] = _flatten(_fourier_resize(part, side) >= _MNIST_THRESHOLD)
        if progress is not None:
            progress(first + len(part))
    return result


def find_images(directory: str | os.PathLike[str]) -> Path:
    """The file of MNIST's training images in a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    names = ("train-images-idx3-ubyte", "train-images-idx3-ubyte.gz", "train-images.idx3-ubyte")
    for folder in ("", "MNIST/raw", "raw", *names):  # as they are published; torchvision's; Kaggle's
        for name in names:
            path = Path(directory, folder, name)
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"{directory} holds no train-images-idx3-ubyte[.gz], nor does its MNIST/raw: point --mnist_dir at a "
        "folder with the MNIST files"
    )


def read_idx_images(path: Path) -> np.ndarray:
    """Reads an IDX file of images, as `read_idx` does.

    Args:
        path: The file.

    Returns:
        uint8 (images, rows, columns).

    Raises:
        OSError: The file cannot be read.
        ValueError: It is corrupt or no IDX file of images.
    """
    images = read_idx(path)
    if images.ndim != 3 or images.dtype != np.uint8:
        raise ValueError(f"{path}: not an IDX file of images: it holds {images.dtype} {images.shape}")
    return images


def _fourier_resize(images: np.ndarray, side: int) -> np.ndarray:
    """Resizes by padding or cropping the spectrum, float64 (images, side, side).

    The same map resizes rows and columns, so that two small matrix products do what two transforms would do slowly.
    """
    resize = _fourier_map(images.shape[1], side)
    columns = resize @ images.astype(np.float64)
    return np.real(columns) @ np.real(resize).T - np.imag(columns) @ np.imag(resize).T


@functools.cache
def _fourier_map(size: int, side: int) -> np.ndarray:
    """What padding or cropping the spectrum does to a vector, complex (side, size)."""
    spectrum = np.fft.fftshift(np.fft.fft(np.eye(size), axis=0), axes=0)
    common = min(size, side)
    resized = np.zeros((side, size), complex)
    inner = slice(side // 2 - common // 2, side // 2 - common // 2 + common)
    outer = slice(size // 2 - common // 2, size // 2 - common // 2 + common)
    resized[inner] = spectrum[outer]
    return np.fft.ifft(np.fft.ifftshift(resized, axes=0), axis=0) * (side / size)


# --- common -----------------------------------------------------------------------------------------------------------


def _flatten(images: np.ndarray) -> np.ndarray:
    """Column by column, as the official images are, uint8 (images, pixels)."""
    return images.transpose(0, 2, 1).reshape(len(images), -1).astype(np.uint8)


def _side(neurons: int) -> int:
    side = math.isqrt(neurons)
    if side * side != neurons:
        raise ValueError(f"images need a square number of neurons, such as 1024 = 32 x 32; got {neurons}")
    return side


def _check_count(count: int) -> None:
    if count < 1:
        raise ValueError(f"at least one feature is needed, got {count}")
