"""What a JAX program calls: `layer`, `infer`, `categories`."""

import functools
from types import EllipsisType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from spdnn_jax import primitives
from spdnn_jax.activation import Clip, resolve
from spdnn_jax.network import SparseLayer, as_arguments
from spdnn_jax.plan import Plan

Backend = Literal["auto", "xla"]
"""`auto`: the native back end of the platform where there is one; `xla`: plain XLA operations."""


def _network(plan: Plan, y0: jax.Array, backend: Backend, *, activations: bool, counts: bool) -> list[jax.Array]:
    if backend not in ("auto", "xla"):
        raise ValueError(f"backend must be 'auto' or 'xla', got {backend!r}")
    run = primitives.network_p.bind if backend == "auto" else primitives.network_xla
    return list(
        run(jnp.asarray(y0), plan.words, table=plan.table, kernel=plan.kernel, activations=activations, counts=counts)
    )


@functools.partial(jax.jit, static_argnames="backend")
def infer(plan: Plan, y0: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """Runs features through all layers of a network: y <- activation(y W + bias), layer by layer.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, one a row: float32, uint8 or bool of shape (features, plan.inputs), or bit-packed uint32 of
            shape (features, ceil(plan.inputs / 32)), where bit b of word w is neuron 32 w + b. Finite numbers: a
            sum that is NaN becomes the lower bound, and an infinite one the largest number (docs/numerics.md).
        backend: `auto` for the native back end, `xla` for plain XLA operations.

    Returns:
        float32 (features, plan.outputs): the activations after the last layer.

    Raises:
        ValueError: y0 has another width or dtype.
    """
    return _network(plan, y0, backend, activations=True, counts=False)[0]


@functools.partial(jax.jit, static_argnames="backend")
def categories(plan: Plan, y0: jax.Array, *, backend: Backend = "auto") -> jax.Array:
    """Tells which features are still active after the last layer: the answer of the Graph Challenge.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        bool (features,): True where some output is not zero. The official files list the 1-based indices of these.

    Raises:
        ValueError: y0 has another width or dtype.
    """
    return _network(plan, y0, backend, activations=False, counts=False)[1]


@functools.partial(jax.jit, static_argnames="backend")
def categories_and_active(plan: Plan, y0: jax.Array, *, backend: Backend = "auto") -> tuple[jax.Array, jax.Array]:
    """As `categories`, with the number of features that are active after each layer.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        bool (features,) and int32 (plan.layers,).

    Raises:
        ValueError: y0 has another width or dtype.
    """
    _, alive, active = _network(plan, y0, backend, activations=False, counts=True)
    return alive, active


@functools.partial(jax.jit, static_argnames="backend")
def activations_and_active(
    plan: Plan, y0: jax.Array, *, backend: Backend = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `infer` and `categories_and_active` in one: what a caller needs who goes on with the activations.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        float32 (features, plan.outputs), bool (features,) and int32 (plan.layers,).

    Raises:
        ValueError: y0 has another width or dtype.
    """
    y, alive, active = _network(plan, y0, backend, activations=True, counts=True)
    return y, alive, active


def layer(
    layer: SparseLayer,
    y: jax.Array | np.ndarray,
    *,
    activation: Clip | None = None,
    cap: float | EllipsisType | None = ...,
    backend: Backend = "auto",
) -> jax.Array:
    """One layer, y <- activation(y W + bias), straight from its compressed rows.

    Differentiable in y, the weights and the bias. For many layers, or many calls, a plan is faster.

    Args:
        layer: The layer.
        y: float32 (features, layer.inputs).
        activation: By default the challenge's ``Clip.relu(32)``.
        cap: Short for ``activation=Clip.relu(cap)``.
        backend: As for `infer`.

    Returns:
        float32 (features, layer.outputs).

    Raises:
        ValueError: y has another width or dtype, or the activation is none.
    """
    clip = resolve(activation, cap)
    if not isinstance(clip, Clip):
        raise ValueError(f"one layer has one activation, got {len(clip)}")
    return _layer(layer, y, activation=clip, backend=backend)


@functools.partial(jax.jit, static_argnames=("activation", "backend"))
def _layer(layer: SparseLayer, y: jax.Array, *, activation: Clip, backend: Backend) -> jax.Array:
    y = jnp.asarray(y)
    if y.ndim != 2 or y.shape[1] != layer.inputs:
        raise ValueError(f"features must have shape (features, {layer.inputs}), got {y.shape}")
    if backend not in ("auto", "xla"):
        raise ValueError(f"backend must be 'auto' or 'xla', got {backend!r}")
    run = primitives.layer_p.bind if backend == "auto" else primitives.layer_xla
    return run(y, *as_arguments(layer), activation=activation)
