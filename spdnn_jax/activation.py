"""Activations: what follows a layer's sums. One family, clipping to two bounds."""

import math
import numbers
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import EllipsisType
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

T = TypeVar("T")


@dataclass(frozen=True)
class Clip:
    """The activation min(max(., lower), upper): ReLU, ReLU6, hard tanh, none, by their bounds.

    Not an array: bounds are numbers that a program is compiled with.

    Attributes:
        lower: The lower bound, -inf for none.
        upper: The upper bound, inf for none. Both are rounded to float32, as activations are.

    Raises:
        ValueError: A bound is no number, is NaN or an array, or overflows float32; or `lower` is not below `upper`.
    """

    lower: float
    upper: float

    def __post_init__(self) -> None:
        lower, upper = _bound("lower", self.lower), _bound("upper", self.upper)
        if not lower < upper:
            raise ValueError(f"the lower bound must lie below the upper one, as float32; got {lower} and {upper}")
        object.__setattr__(self, "lower", lower)
        object.__setattr__(self, "upper", upper)

    @classmethod
    def relu(cls, cap: float | None = None) -> "Clip":
        """Zero below zero; `cap` at most, where it is not None.

        Raises:
            ValueError: The cap is not a positive number.
        """
        if cap is None:
            return cls(0.0, math.inf)
        if not _bound("cap", cap) > 0:
            raise ValueError(f"cap must be positive, or None for none; got {cap}")
        return cls(0.0, cap)

    @classmethod
    def identity(cls) -> "Clip":
        """No activation: the sums as they are, as of a last layer that gives logits."""
        return cls(-math.inf, math.inf)


def clipped(sums: jax.Array, lower: Any, upper: Any) -> jax.Array:
    """Sums, float32, clipped to two bounds as all back ends do it.

    A sum that is NaN becomes the lower bound. Activations are finite: an infinite bound stands for the largest number.
    """
    largest = np.finfo(np.float32).max
    lower, upper = (jnp.clip(jnp.float32(bound), -largest, largest) for bound in (lower, upper))
    return jnp.minimum(jnp.where(sums > lower, sums, lower), upper)


Activation = Clip | tuple[Clip, ...]
"""One for all layers, or one a layer."""


def _bound(name: str, value: Any) -> float:
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        raise ValueError(f"{name} must be a number that is known when the program is written; got {value!r}")
    try:
        exact = float(value)
    except OverflowError:
        exact = math.nan
    with np.errstate(over="ignore"):
        bound = float(np.float32(exact))
    if math.isnan(bound) or (math.isinf(bound) and not math.isinf(exact)):
        raise ValueError(f"{name} must be a number of float32, or infinite for none; got {value}")
    return bound + 0.0  # -0.0 becomes 0.0


def resolve(activation: Clip | Iterable[Clip] | None, cap: float | EllipsisType | None) -> Activation:
    """The activation that a caller means.

    Args:
        activation: One for all layers, or one a layer; None where `cap` says it.
        cap: Short for ``Clip.relu(cap)``; ``...`` where it was not given: with neither, the challenge's 32.

    Raises:
        ValueError: Both were given, or something else than a `Clip`, or an impossible cap.
    """
    if activation is None:
        return Clip.relu(32.0 if isinstance(cap, EllipsisType) else cap)
    if not isinstance(cap, EllipsisType):
        raise ValueError("activation and cap were given: cap is short for activation=Clip.relu(cap), pass one of them")
    if isinstance(activation, Clip):
        return activation
    each = tuple(activation) if isinstance(activation, Iterable) else (activation,)
    for clip in each:
        if not isinstance(clip, Clip):
            raise ValueError(f"an activation must be a Clip, such as Clip.relu() or Clip.identity(); got {clip!r}")
    return each


def paired(layers: Iterable[T], activation: Activation) -> Iterator[tuple[T, Clip]]:
    """Each layer with its activation, as they are asked for.

    Raises:
        ValueError: There are more activations than layers, or fewer.
    """
    count = 0
    for count, layer in enumerate(layers, start=1):
        if isinstance(activation, Clip):
            yield layer, activation
        elif count <= len(activation):
            yield layer, activation[count - 1]
        else:
            raise ValueError(f"{len(activation)} activations were given, but there are more layers")
    if not isinstance(activation, Clip) and count < len(activation):
        raise ValueError(f"{len(activation)} activations were given, but there are {count} layers")
