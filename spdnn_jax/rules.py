"""What all primitives have in common: features lie anywhere, with any number of leading axes, and need no other."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import dispatch
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import _native

_EDGES_WORTH_A_THREAD = 1e6  # about a tenth of a millisecond


@dataclass(frozen=True, eq=False)
class Kernel:
    """A computation on features that do not talk to each other, and how each platform does it.

    Attributes:
        name: The primitive's.
        xla: It in plain XLA, for the platforms without a rule of their own.
        native: Lowering rules by platform.
        features: Numbers of the arguments that hold activations, (..., features, neurons).
        sums: Numbers of the results that are sums over the features; the others have the features' leading axes.

    `xla` and `native` see one leading axis; abstract evaluation and the other rules any number of them.
    """

    name: str
    xla: Callable[..., Sequence[jax.Array]]
    native: dict[str, Any]
    features: tuple[int, ...] = (0,)
    sums: tuple[int, ...] = ()


def native(cpu: Callable[..., Any], cuda: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Lowering rules for the platforms that have a native back end.

    Args:
        cpu: Makes the custom call of the CPU.
        cuda: That of CUDA; by default `cpu` does, with the argument `cuda=True`.
    """
    calls = {"cpu": cpu}
    if _native.has_cuda_library():
        calls["cuda"] = cuda or functools.partial(cpu, cuda=True)
    return {platform: mlir.lower_fun(call, multiple_results=True) for platform, call in calls.items()}


def define(kernel: Kernel, abstract: Callable[..., list[Any]]) -> Primitive:
    """The primitive of a kernel, without rules for batching and derivatives.

    It is lowered to a second one, on two-dimensional activations, inside a partitioning rule: under `jit` each device
    takes the features that it holds.

    Args:
        kernel: The kernel.
        abstract: Abstract evaluation, for any number of leading axes.
    """
    local = Primitive(f"{kernel.name}_local")
    local.multiple_results = True
    local.def_abstract_eval(abstract)
    mlir.register_lowering(local, mlir.lower_fun(kernel.xla, multiple_results=True))
    for platform, rule in kernel.native.items():
        mlir.register_lowering(local, rule, platform=platform)

    def lower(ctx: mlir.LoweringRuleContext, *args: Any, **params: Any) -> Any:
        names = tuple(sorted(params))
        run = _run_of(kernel, local, names, tuple(params[name] for name in names))
        devices = getattr(ctx.module_context.axis_context, "num_devices", 0)
        return mlir.lower_fun(run if devices == 1 else _partitioned(kernel, run), multiple_results=True)(ctx, *args)

    primitive = Primitive(kernel.name)
    primitive.multiple_results = True
    primitive.def_abstract_eval(abstract)
    primitive.def_impl(functools.partial(dispatch.apply_primitive, primitive))
    mlir.register_lowering(primitive, lower)
    dispatch.prim_requires_devices_during_lowering.add(primitive)  # as JAX does with custom_partitioning's own
    return primitive


@functools.lru_cache(maxsize=4096)
def _run_of(
    kernel: Kernel, local: Primitive, names: tuple[str, ...], values: tuple[Any, ...]
) -> Callable[..., list[jax.Array]]:
    """The computation on activations with any number of leading axes."""
    params = dict(zip(names, values, strict=True))

    def run(*args: jax.Array) -> list[jax.Array]:
        leading = args[kernel.features[0]].shape[:-1]
        rows = int(np.prod(leading))
        flat = [_reshape(arg, (rows, arg.shape[-1])) if k in kernel.features else arg for k, arg in enumerate(args)]
        return [
            result if k in kernel.sums else _reshape(result, (*leading, *result.shape[1:]))
            for k, result in enumerate(local.bind(*flat, **params))
        ]

    return run


@functools.lru_cache(maxsize=4096)
def _partitioned(kernel: Kernel, run: Callable[..., list[jax.Array]]) -> Callable[..., list[jax.Array]]:
    """The same, on each device for the features that lie there."""

    def partition(mesh: Mesh, args: tuple[Any, ...], results: Sequence[Any]) -> tuple[Any, ...]:
        features = args[kernel.features[0]]
        spec = getattr(features.sharding, "spec", P())  # none where a mesh is in context, but no array on it
        *leading, neurons = [*spec, *[None] * (len(features.shape) - len(spec))]
        check_neurons_whole(neurons)
        axes = [axis for part in leading if part is not None for axis in ((part,) if isinstance(part, str) else part)]

        def run_shard(*shards: jax.Array) -> list[jax.Array]:
            of_shard = run(*shards)
            return [jax.lax.psum(y, axes) if k in kernel.sums and axes else y for k, y in enumerate(of_shard)]

        def placed(k: int, features: Sequence[int], ndim: int) -> NamedSharding:
            return NamedSharding(mesh, P(*leading, *[None] * (ndim - len(leading))) if k in features else P())

        with_features = [k for k in range(len(results)) if k not in kernel.sums]
        result_shardings = [placed(k, with_features, len(result.shape)) for k, result in enumerate(results)]
        arg_shardings = tuple(placed(k, kernel.features, len(arg.shape)) for k, arg in enumerate(args))
        return mesh, run_shard, result_shardings, arg_shardings

    call = custom_partitioning(run)
    call.def_partition(partition, sharding_rule=functools.partial(_sharding_rule, kernel))
    return call


def _reshape(array: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Without a thought for shardings in types: what is sharded is reshaped shard by shard, after the partitioning."""
    if array.shape == shape:
        return array
    mesh = jax.typeof(array).sharding.mesh
    return jax.lax.reshape(array, shape, out_sharding=None if mesh.empty else NamedSharding(mesh, P()))


def _sharding_rule(kernel: Kernel, mesh: Mesh, args: Sequence[Any], results: Sequence[Any]) -> SdyShardingRule:
    """Leading axes of features are the same in arguments and results; nothing else is shared."""
    del mesh
    leading = [f"lead{k}" for k in range(len(args[kernel.features[0]].shape) - 1)]

    def mapping(name: str, shape: Sequence[int], has_features: bool) -> ArrayMapping:
        own = [f"{name}{k}" for k in range(len(shape) - (len(leading) if has_features else 0))]
        return ArrayMapping(*(leading if has_features else []), *own)

    return SdyShardingRule(
        tuple(mapping(f"arg{k}_", arg.shape, k in kernel.features) for k, arg in enumerate(args)),
        tuple(mapping(f"result{k}_", result.shape, k not in kernel.sums) for k, result in enumerate(results)),
    )


def check_neurons_whole(neurons: Any) -> None:
    """Raises ValueError where the axis of neurons is sharded: every device needs whole features."""
    if neurons is not None:
        raise ValueError(
            f"the neurons (the last axis) are sharded over the mesh axis {neurons!r}, but every device needs whole "
            "features: shard another axis, or reshard first"
        )


def check_features_whole(*avals: Any) -> None:
    """As `check_neurons_whole`, of abstract values, where shardings are part of the type (Explicit meshes)."""
    for aval in avals:
        spec = aval.sharding.spec
        if len(spec) == aval.ndim:
            check_neurons_whole(spec[-1])


def sum_of(features: Any, shape: tuple[int, ...], **changes: Any) -> Any:
    """The abstract value of a sum over features: of another shape, and whole on every device."""
    return features.update(shape=shape, sharding=features.sharding.update(spec=P(*[None] * len(shape))), **changes)


def work_to_count(scalar: jax.Array, edges: float) -> list[jax.Array]:
    """An argument more for a custom call on the CPU, so that the program is dispatched and not waited for.

    A program that XLA counts fewer than 1,000 floating-point operations in runs on the caller's own thread; and of a
    custom call it counts none. So a small product goes before it, where the call is worth another thread.

    Args:
        scalar: Any number that the program is given.
        edges: How many the call multiplies.
    """
    if edges < _EDGES_WORTH_A_THREAD:
        return []
    tile = jnp.full((16, 16), scalar.astype(jnp.float32))
    return [tile @ tile]


# --- batching and derivatives -----------------------------------------------------------------------------------------


def zero_tangent(primal: Any) -> ad.Zero:
    """The tangent of what does not depend on anything."""
    return ad.Zero(jax.typeof(primal).to_tangent_aval())


def batch_features(
    primitive: Primitive, features: Sequence[int], args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """A batching rule: features do not talk to each other, so a batch of feature sets is one set with an axis more.

    Args:
        primitive: The primitive.
        features: Numbers of the arguments with leading axes. Where one of them is mapped, all become so; where any
            other argument is mapped, the primitive runs once for each member of the batch.
        args: The arguments.
        dims: Their mapped axes.
        params: The primitive's parameters.
    """
    if any(dim is not None for k, dim in enumerate(dims) if k not in features):
        return map_over_batch(primitive, args, dims, **params)
    size = next(arg.shape[dim] for arg, dim in zip(args, dims, strict=True) if dim is not None)
    args = list(args)
    for k in features:
        args[k] = batching.bdim_at_front(args[k], dims[k], size)
    results = primitive.bind(*args, **params)
    return results, [0] * len(results)


def map_over_batch(
    primitive: Primitive, args: Sequence[Any], dims: Sequence[Any], **params: Any
) -> tuple[list[Any], list[int]]:
    """Runs the primitive once for each member of the batch: right whatever is mapped, if not fast."""
    mapped = [k for k, dim in enumerate(dims) if dim is not None]

    def one(members: tuple[Any, ...]) -> list[Any]:
        full = list(args)
        for k, member in zip(mapped, members, strict=True):
            full[k] = member
        return primitive.bind(*full, **params)

    results = jax.lax.map(one, tuple(jnp.moveaxis(args[k], dims[k], 0) for k in mapped))
    return results, [0] * len(results)


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """The arrays, all varying over the mesh axes over which one of them does, as `shard_map` asks of operands.

    The transpose of this is the sum over those axes that a gradient needs.
    """
    axes = frozenset().union(*map(_varying_axes, arrays))
    return [_vary(array, tuple(sorted(axes - _varying_axes(array)))) for array in arrays]


def _varying_axes(array: jax.Array) -> frozenset[str]:
    aval: Any = jax.typeof(array)
    return aval.mat.varying if hasattr(aval, "mat") else aval.vma  # the newer name, and the older


def _vary(array: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    return jax.lax.pcast(array, axes, to="varying") if axes else array
