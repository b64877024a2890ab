"""What a JAX program calls: `layer`, `infer`, `categories`."""

import functools
import math
from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from spdnn_jax import checks, dense, primitives, products, rules
from spdnn_jax.activation import Clip, resolve
from spdnn_jax.features import as_features
from spdnn_jax.network import SparseLayer, SparseNetwork, as_arguments, as_layer, as_network
from spdnn_jax.plan import Plan, as_plan

Backend = Literal["auto", "xla"]
"""`auto`: the native back end of the platform where there is one; `xla`: plain XLA operations."""


COMPILER_OPTIONS: dict[str, Any] = {"xla_gpu_graph_min_graph_size": 1}
"""For the outermost `jax.jit` or `compile` of a program that calls a plan again and again on a GPU: XLA then replays a
call's launches as one CUDA graph, where it would queue them one by one. Other devices take no notice."""


def _network(plan: Any, y0: Any, backend: Any, *, activations: bool = False, counts: bool = False) -> list[jax.Array]:
    """Looks at what was given, before JAX converts it."""
    plan = as_plan(plan)
    y0 = as_features(y0, plan.inputs)
    layers = () if plan.dense is None else plan.dense.chosen(plan.table, math.prod(y0.shape[:-1]))
    return _jitted_network(plan, y0, backend=_known(backend), layers=layers, activations=activations, counts=counts)


@functools.partial(jax.jit, static_argnames=("backend", "layers", "activations", "counts"))
def _jitted_network(
    plan: Plan, y0: jax.Array, *, backend: Backend, layers: tuple[int, ...], activations: bool, counts: bool
) -> list[jax.Array]:
    """`layers` are dense products, but in plain XLA, which runs what the kernels do."""
    rows = plan.rows
    words = [plan.words] if rows is None else [plan.words, rows.words]
    static = {"table": plan.table, "rows": rows and rows.table, "kernel": plan.kernel}
    static |= {"activations": activations, "counts": counts}
    if backend == "auto" and plan.dense is not None and layers:
        return dense.network(jnp.asarray(y0), words[0], words[1:], plan.dense, layers=layers, **static)
    if backend == "auto":
        return primitives.network_p.bind(jnp.asarray(y0), *words, **static)
    return _plain_xla(primitives.network_xla, static, jnp.asarray(y0), *words)


def _known(backend: Any) -> Backend:
    if backend not in ("auto", "xla"):
        raise ValueError(f"backend must be 'auto' or 'xla', got {backend!r}")
    return backend


def _plain_xla(
    run: Callable[..., Sequence[jax.Array]], static: dict[str, Any], y: jax.Array, *arrays: jax.Array
) -> list[jax.Array]:
    """Runs a plain-XLA function, which takes one axis of features, on features with any number of leading axes.

    Where shardings are part of types (Explicit meshes), those inside are left to XLA: gathers would want to be told.

    Args:
        run: The function. Its first two results have the leading axes, a third has not.
        static: Its static arguments.
        y: The features.
        arrays: Its other arguments.
    """
    leading, width = y.shape[:-1], y.shape[-1]

    def flat(y: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
        results = run(y.reshape(math.prod(leading), width), *arrays, **static)
        per_feature = [result.reshape(*leading, *result.shape[1:]) for result in results[:2]]
        return [*per_feature, *results[2:]]

    sharding: Any = jax.typeof(y).sharding
    if not sharding.mesh.explicit_axes:
        return flat(y, *arrays)
    rules.check_features_whole(jax.typeof(y))
    own = tuple(sharding.spec)[: len(leading)]
    shapes = jax.eval_shape(flat, *(jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (y, *arrays)))
    specs = [P(*own, *[None] * (len(shape.shape) - len(leading))) for shape in shapes[:2]] + [P(None)] * len(shapes[2:])
    with jax.sharding.use_abstract_mesh(sharding.mesh):
        run_auto: Any = jax.sharding.auto_axes(flat, out_sharding=specs)
        return run_auto(y, *arrays)


def infer(plan: Plan, y0: ArrayLike, *, backend: Backend = "auto") -> jax.Array:
    """Runs features through all layers of a network: y <- activation(y W + bias), layer by layer.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, of shape (features, plan.inputs): one a row, or one alone as a vector, or with any number of
            leading axes. float32, uint8 and bool are read as they are, all other real numbers as float32; uint32 is
            bit-packed, of shape (features, ceil(plan.inputs / 32)), see `pack_bits`. Finite numbers: a sum that is
            NaN becomes the lower bound, one that overflows the largest number (docs/numerics.md).
        backend: `auto` for the native back end, `xla` for plain XLA operations.

    Returns:
        float32 (features, plan.outputs): the activations after the last layer; leading axes as in y0.

    Raises:
        ValueError: The plan is none, or y0 is no array, of another width or kind, or overflows float32.
    """
    return _network(plan, y0, backend, activations=True)[0]


def categories(plan: Plan, y0: ArrayLike, *, backend: Backend = "auto") -> jax.Array:
    """Tells which features are still active after the last layer: the answer of the Graph Challenge.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        bool (features,), or the leading axes of y0: True where some output is not zero. The official files list the
        1-based indices of these.

    Raises:
        ValueError: As for `infer`.
    """
    return _network(plan, y0, backend)[1]


def categories_and_active(plan: Plan, y0: ArrayLike, *, backend: Backend = "auto") -> tuple[jax.Array, jax.Array]:
    """As `categories`, with the number of features that are active after each layer.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        bool (features,) and int32 (plan.layers,).

    Raises:
        ValueError: As for `infer`.
    """
    _, alive, active = _network(plan, y0, backend, counts=True)
    return alive, active


def activations_and_active(
    plan: Plan, y0: ArrayLike, *, backend: Backend = "auto"
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """As `infer` and `categories_and_active` in one: what a caller needs who goes on with the activations.

    Args:
        plan: The network, from `build_plan`.
        y0: The features, as for `infer`.
        backend: As for `infer`.

    Returns:
        float32 (features, plan.outputs), bool (features,) and int32 (plan.layers,).

    Raises:
        ValueError: As for `infer`.
    """
    y, alive, active = _network(plan, y0, backend, activations=True, counts=True)
    return y, alive, active


def layer(
    layer: SparseLayer,
    y: ArrayLike,
    *,
    activation: Clip | None = None,
    cap: float | EllipsisType | None = ...,
    backend: Backend = "auto",
) -> jax.Array:
    """One layer, y <- activation(y W + bias), straight from its compressed rows.

    Differentiable in y, the weights and the bias. For many layers, or many calls, a plan is faster.

    Args:
        layer: The layer; or a SciPy matrix (inputs, outputs), which is taken as one without bias.
        y: The features, (features, layer.inputs), one alone as a vector, or with any number of leading axes; all real
            numbers, as float32.
        activation: By default the challenge's ``Clip.relu(32)``.
        cap: Short for ``activation=Clip.relu(cap)``.
        backend: As for `infer`.

    Returns:
        float32 (features, layer.outputs); leading axes as in y.

    Raises:
        ValueError: The layer is none or malformed, y is no array, of another width or kind, or overflows float32, or
            the activation is none.
    """
    clip = resolve(activation, cap)
    if not isinstance(clip, Clip):
        raise ValueError(f"one layer has one activation, got {len(clip)}")
    return _layers((as_layer(layer),), (clip,), y, backend)


def apply(network: SparseNetwork, y: ArrayLike, *, backend: Backend = "auto") -> jax.Array:
    """Runs features through a network whose weights are arguments: for training, where `infer` is for what is trained.

    Differentiable in y and in the values and biases of the network, to any order, forward and reverse. At the bounds of
    an activation the derivative is 0, as `jax.nn.relu` has it.

    Args:
        network: The network. Derivatives are faster where its layers have their transposed index, as `trainable` and
            `SparseLayer.with_transposed` give it to them.
        y: The features, (features, network.inputs), as for `layer`.
        backend: As for `infer`.

    Returns:
        float32 (features, network.outputs); leading axes as in y.

    Raises:
        ValueError: As for `layer`.
    """
    if isinstance(network, Plan):
        raise ValueError("apply takes a SparseNetwork, got a Plan: call infer")
    network = as_network(network)
    return _layers(network.layers, network.activation, y, backend)


def _layers(layers: Sequence[SparseLayer], activation: tuple[Clip, ...], y: Any, backend: Any) -> jax.Array:
    """Looks at what was given, before JAX converts it."""
    named = "the layer" if len(layers) == 1 else "layer {}"
    converted = tuple(layer.converted(named.format(number)) for number, layer in enumerate(layers, start=1))
    y = checks.array("features", as_features(y, converted[0].inputs, packed=False), np.float32)
    return _jitted_layers(converted, y, activation=activation, backend=_known(backend))


@functools.partial(jax.jit, static_argnames=("activation", "backend"))
def _jitted_layers(
    layers: tuple[SparseLayer, ...], y: jax.Array, *, activation: tuple[Clip, ...], backend: Backend
) -> jax.Array:
    y = jnp.asarray(y)
    for sparse_layer, clip in zip(layers, activation, strict=True):
        bounds = {"lower": clip.lower, "upper": clip.upper}
        arrays = as_arguments(sparse_layer)
        y = (
            products.layer(y, *arrays, **bounds)
            if backend == "auto"
            else _plain_xla(products.layer_xla, bounds, y, *arrays)[0]
        )
    return y
