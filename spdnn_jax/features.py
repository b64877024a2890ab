"""Features: the forms that the back ends read, and what is made of all others."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from spdnn_jax import checks

PACKED = jnp.uint32
"""Features of this dtype are bit-packed: bit b of word w is neuron 32 w + b."""

BITS = 32
"""Neurons in a word of bit-packed features."""

_READ_AS_THEY_ARE = (np.dtype(np.float32), np.dtype(np.uint8), np.dtype(np.bool_))


def as_features(given: Any, inputs: int, *, packed: bool = True) -> Any:
    """Features as the back ends take them: float32, uint8, bool or bit-packed, all other real numbers as float32.

    Args:
        given: As for `array`; one feature is a vector, and there may be any number of leading axes.
        inputs: Number of input neurons.
        packed: Whether bit-packed features are taken.

    Raises:
        ValueError: They are no array, of another kind or width, or overflow float32.
    """
    y = checks.array("features", given)
    is_packed = y.dtype == PACKED
    if is_packed and not packed:
        raise ValueError("features of uint32 are bit-packed, which only plans take: convert counts to int32")
    width = -(-inputs // BITS) if is_packed else inputs
    if y.ndim < 1 or y.shape[-1] != width:
        form = "bit-packed features (uint32; convert counts to int32)" if is_packed else f"features of {y.dtype}"
        raise ValueError(
            f"features must have shape (features, {width}), ({width},) or (..., {width}): {inputs} inputs, {form}; "
            f"got {y.shape}"
        )
    return y if is_packed or y.dtype in _READ_AS_THEY_ARE else checks.array("features", y, np.float32)


def pack_bits(features: Any) -> np.ndarray:
    """Packs features of 0 and 1 into words: bit b of word w is neuron 32 w + b.

    Args:
        features: (..., neurons) of 0 and 1, of any dtype.

    Returns:
        uint32 (..., ceil(neurons / 32)), on the host.

    Raises:
        ValueError: They are no array, or hold something else than 0 and 1.
    """
    plain = np.asarray(checks.array("features", features))
    if plain.ndim < 1:
        raise ValueError("features must have shape (..., neurons), got one number")
    if plain.dtype != np.bool_:
        checks.check_kind("features", plain, np.float32)
        wrong = plain > 1 if plain.dtype == np.uint8 else (plain != 0) & (plain != 1)
        if wrong.any():
            raise ValueError(f"features to be packed must be 0 or 1, got {plain[wrong][0]}")
    bits = np.packbits(plain.astype(bool, copy=False), axis=-1, bitorder="little")
    words = -(-plain.shape[-1] // BITS)
    padded = np.zeros((*plain.shape[:-1], words * (BITS // 8)), np.uint8)
    padded[..., : bits.shape[-1]] = bits
    return padded.view("<u4")
