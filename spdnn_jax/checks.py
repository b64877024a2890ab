"""The gate of every entry: container, kind, shape and range of what was given are looked at before it is converted."""

import numbers
import operator
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

if TYPE_CHECKING:
    from jax.experimental import sparse

Array = jax.Array | np.ndarray
Shape = tuple[int | None, ...]
"""None stands for any size."""

INT32 = np.iinfo(np.int32).max


# --- containers -------------------------------------------------------------------------------------------------------


def is_scipy(given: Any) -> bool:
    """Whether something is a sparse matrix or array of SciPy, which need not be installed."""
    scipy_sparse = sys.modules.get("scipy.sparse")  # who holds such a matrix has imported it
    return scipy_sparse is not None and (scipy_sparse.issparse(given) or isinstance(given, scipy_sparse.sparray))


def scipy_indices(matrix: Any) -> None:
    """Looks at the indices of a SciPy matrix in a compressed format: its conversions read and write where they point.

    Raises:
        ValueError: They are malformed.
    """
    if not hasattr(matrix, "check_format"):
        return
    matrix.check_format(full_check=True)  # which takes all pointers where there are no entries, or numbers overflow
    if (matrix.indptr[1:] < matrix.indptr[:-1]).any():
        raise ValueError("index pointers must not fall")


def is_bcoo(given: Any) -> bool:
    """Whether something is a sparse matrix of JAX, BCOO or BCSR."""
    return _is_jax_sparse(given, "BCOO") or _is_jax_sparse(given, "BCSR")


def is_bcsr(given: Any) -> "TypeGuard[sparse.BCSR]":
    """Whether something is a sparse matrix of JAX, BCSR."""
    return _is_jax_sparse(given, "BCSR")


def _is_jax_sparse(given: Any, name: str) -> bool:
    """Whether something is of a class of jax.experimental.sparse, which takes long to import, SciPy with it."""
    module = sys.modules.get("jax.experimental.sparse")  # who holds such a matrix has imported it
    return module is not None and isinstance(given, getattr(module, name))


def kind_of(given: Any) -> str:
    """What something is, for messages."""
    if isinstance(given, Array):
        return f"an array of {given.dtype} {given.shape}"
    if is_scipy(given):
        return f"a SciPy matrix {given.shape}"
    return "None" if given is None else f"a {type(given).__name__}"


def constructor_for(given: Any) -> str:
    """The builder of layers that takes something, for messages."""
    if is_scipy(given):
        return "SparseLayer.from_scipy"
    if is_bcoo(given):
        return "SparseLayer.from_bcoo"
    if isinstance(given, Array | Sequence) and not isinstance(given, str | bytes):
        return "SparseLayer.from_dense"
    return "SparseLayer.from_scipy, from_bcoo or from_dense"


# --- arrays and counts ------------------------------------------------------------------------------------------------


def array(name: str, given: Any, dtype: Any = None, shapes: Sequence[Shape] = ()) -> Any:
    """Something given, as an array.

    Args:
        name: What to call it in messages.
        given: An array on the host, on a device or traced, or what NumPy makes an array of.
        dtype: What to convert to, a type of integers, which takes integers alone, or of floating-point numbers, which
            takes all real numbers. None to convert nothing.
        shapes: Those allowed; empty for all.

    Returns:
        The array, where it was. It is the same array if there is nothing to convert.

    Raises:
        ValueError: It is no array, of another kind or shape, or holds a number out of the dtype's range. Of traced
            arrays, kind and shape alone are known.
    """
    found = plain_array(name, given)
    check_kind(name, found, dtype)
    if shapes and not any(_fits(found.shape, shape) for shape in shapes):
        raise ValueError(f"{name} must have shape {' or '.join(map(_written, shapes))}, got {found.shape}")
    if dtype is None or found.dtype == dtype:
        return found
    if isinstance(found, Tracer):
        return found.astype(dtype)
    return _narrowed(name, found, np.dtype(dtype))


def count(name: str, given: Any, lowest: int = 0, highest: int | None = INT32) -> int:
    """Something given, as a whole number.

    Args:
        name: What to call it in messages.
        given: An integer, of Python, NumPy or JAX.
        lowest: The least one allowed.
        highest: The greatest one allowed, None for no bound.

    Raises:
        ValueError: It is no whole number, or out of range.
    """
    try:
        if isinstance(given, bool | np.bool_):
            raise TypeError
        number = operator.index(given)
    except TypeError:
        value = repr(given) if isinstance(given, numbers.Number) else kind_of(given)
        raise ValueError(f"{name} must be a whole number, got {value}") from None
    if number < lowest or (highest is not None and number > highest):
        bounds = f"of at least {lowest}" if highest is None else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be a whole number {bounds}, got {number}")
    return number


def plain_array(name: str, given: Any) -> Any:
    """Something given as an array of any kind, ValueError where it is none."""
    if isinstance(given, np.ma.MaskedArray):
        raise ValueError(f"{name} must be an array without a mask: call .filled() first")
    if isinstance(given, Array):
        return given
    if is_scipy(given) or is_bcoo(given):
        dense = "todense" if is_bcoo(given) else "toarray"
        raise ValueError(f"{name} must be a dense array, got {kind_of(given)}: call .{dense}() first")
    if given is None or isinstance(given, str | bytes):
        raise ValueError(f"{name} must be an array, got {kind_of(given)}")
    try:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(given)):
            return jnp.asarray(given)
        found = np.asarray(given)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} must be an array, got {kind_of(given)} ({error})") from None
    if found.dtype == object:
        raise ValueError(f"{name} must be an array of numbers, got {kind_of(given)}")
    return found


def check_kind(name: str, found: Any, dtype: Any) -> None:
    """Raises ValueError where an array is of a kind that does not convert to the dtype."""
    if dtype is None:
        return
    if jnp.issubdtype(dtype, np.integer):
        if not jnp.issubdtype(found.dtype, np.integer):
            raise ValueError(f"{name} must be integers, got {found.dtype}")
    elif not any(jnp.issubdtype(found.dtype, kind) for kind in (np.floating, np.integer, np.bool_)):
        raise ValueError(f"{name} must be real numbers, got {found.dtype}")


def _fits(shape: tuple[int, ...], allowed: Shape) -> bool:
    return len(shape) == len(allowed) and all(size in (None, own) for own, size in zip(shape, allowed, strict=True))


def _written(shape: Shape) -> str:
    sizes = ", ".join("any" if size is None else str(size) for size in shape)
    return f"({sizes},)" if len(shape) == 1 else f"({sizes})"


def _narrowed(name: str, found: Any, dtype: np.dtype) -> Any:
    """The array converted, where every number has a place in the dtype."""
    with np.errstate(over="ignore"):
        converted = found.astype(dtype)
    if jnp.issubdtype(dtype, np.integer):
        own, limits = np.iinfo(found.dtype), np.iinfo(dtype)
        if own.min >= limits.min and own.max <= limits.max:
            return converted
        host = np.asarray(found)
        wrong = (host < limits.min) | (host > limits.max)
    elif jnp.issubdtype(found.dtype, np.floating) and jnp.finfo(found.dtype).max > jnp.finfo(dtype).max:
        wrong = np.isinf(np.asarray(converted)) & ~np.isinf(np.asarray(found))
    else:
        return converted
    if wrong.any():
        position = int(np.argmax(wrong))
        raise ValueError(
            f"{name}: number {position} is {np.asarray(found).reshape(-1)[position]}, out of the range of {dtype}"
        )
    return converted


# --- contents ---------------------------------------------------------------------------------------------------------

_seen: "weakref.WeakValueDictionary[tuple[int, Any, int], jax.Array]" = weakref.WeakValueDictionary()


def on_host(name: str, given: Any) -> np.ndarray:
    """As `array`, on the host.

    Raises:
        ValueError: As for `array`, or the array is traced: builders read what they are given.
    """
    found = array(name, given)
    if isinstance(found, Tracer):
        raise ValueError(f"{name} is traced (inside jit, vmap or grad), but must be known here: build outside, once")
    return np.asarray(found)


def on_device(given: Any) -> jax.Array:
    """On the default device, a copy. Of NumPy arrays JAX 0.10's `jnp.asarray` compiles a program for every shape."""
    return jax.device_put(np.array(given)) if isinstance(given, np.ndarray) else jnp.asarray(given)


def once(found: Any, bound: int, check: Callable[[np.ndarray, int], None]) -> None:
    """Checks an array's contents. Those on a device cannot change, and are read when they are seen first.

    Args:
        found: The array; nothing is known of a traced one, or one of which this process holds a part.
        bound: What to compare it with.
        check: What raises where something is wrong, from the array on the host and the bound.
    """
    if isinstance(found, np.ndarray):
        check(found, bound)
        return
    key = id(found), getattr(check, "func", check), bound
    if isinstance(found, Tracer) or _seen.get(key) is found or not found.is_fully_addressable:
        return
    check(np.asarray(found), bound)
    _seen[key] = found
