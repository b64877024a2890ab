"""Many devices: features spread over a mesh, the network on every device (arXiv 2007.14152).

Features do not talk to each other, so devices need not either. What keeps them equally busy is how features are *dealt
out*: round-robin, for features that lie side by side are often alike, and a run of them would live or die together.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import checks, ops
from spdnn_jax.features import as_features
from spdnn_jax.layout import PlanTable, clip_of
from spdnn_jax.plan import Plan, as_plan

AXIS = "features"
"""The mesh axis that features are spread over."""

_DEALING_ROUNDS = 8
"""`infer_sharded` deals where every device has this many features for every device: padding to whole rounds then adds
at most an eighth, of features that die at once."""

# --- meshes and plans -------------------------------------------------------------------------------------------------


def feature_mesh(devices: int | None = None) -> Mesh:
    """A mesh with the axis `features`.

    Args:
        devices: How many devices, the first of `jax.devices()`; None for all, over all processes.

    Raises:
        ValueError: There are not so many, or a process would be left without.
    """
    available = jax.devices()
    count = len(available) if devices is None else checks.count("devices", devices)
    if not 1 <= count <= len(available):
        raise ValueError(f"{count} devices were asked for, JAX sees {len(available)} of them: lower --devices")
    if jax.process_count() > 1 and count != len(available):
        raise ValueError(f"{jax.process_count()} processes use all their {len(available)} devices: drop --devices")
    return Mesh(np.asarray(available[:count]), (AXIS,), axis_types=(AxisType.Auto,))


def replicate(plan: Plan, mesh: Mesh) -> Plan:
    """The plan on every device of the mesh, so that no call copies it again.

    In a run of several processes each of them calls this with the same plan.
    """

    def everywhere(array: jax.Array) -> jax.Array:
        host = np.asarray(array)
        return jax.make_array_from_callback(host.shape, NamedSharding(mesh, P()), lambda index: host[index])

    return jax.tree.map(everywhere, as_plan(plan))


# --- in a JAX program -------------------------------------------------------------------------------------------------


def infer_sharded(plan: Plan, y0: jax.Array | np.ndarray, mesh: Mesh, *, backend: ops.Backend = "auto") -> jax.Array:
    """As `infer`, with the features spread over a mesh and the network on every device of it.

    Works under `jit` and `lax.scan`. Each device deals its features out to all devices, round-robin, and gets their
    results back: two all-to-alls, and no other communication. With fewer than 8 features on a device for every device,
    features stay where they are. A number of features that the devices do not divide is padded with features that are
    all zero and cut again; as JAX shards evenly or not at all, the result then lies whole on every device.

    Args:
        plan: The network; put it on the devices once with `replicate`, else every call copies it.
        y0: The features, as for `infer`, however they are sharded; sharded over `features` they need no copy.
        mesh: A mesh with the axis `features`, of any number of devices, such as `feature_mesh` makes.
        backend: As for `infer`.

    Returns:
        float32 (features, plan.outputs) in the order of y0, sharded over `features` where that divides their number.

    Raises:
        ValueError: y0 has another width or dtype, or the mesh has no axis `features`.
    """
    return _sharded(ops.infer, plan, y0, mesh, backend)


def categories_sharded(
    plan: Plan, y0: jax.Array | np.ndarray, mesh: Mesh, *, backend: ops.Backend = "auto"
) -> jax.Array:
    """As `categories`, with the features spread over a mesh; all else as for `infer_sharded`.

    Args:
        plan: As for `infer_sharded`.
        y0: As for `infer_sharded`.
        mesh: As for `infer_sharded`.
        backend: As for `infer`.

    Returns:
        bool (features,) in the order of y0.

    Raises:
        ValueError: As for `infer_sharded`.
    """
    return _sharded(ops.categories, plan, y0, mesh, backend)


def _sharded(run: Callable[..., jax.Array], plan: Plan, y0: Any, mesh: Mesh, backend: ops.Backend) -> jax.Array:
    y0 = as_features(y0, as_plan(plan).inputs)
    if y0.ndim != 2:
        raise ValueError(f"features to be spread must have shape (features, {y0.shape[-1]}), got {y0.shape}")
    rows, features = _round_up(y0.shape[0], _devices_of(mesh)), y0.shape[0]
    if rows == features:
        return _spread(plan, _laid(y0, mesh, P(AXIS)), run=run, mesh=mesh, backend=backend)
    # What is padded or cut lies whole on both sides: XLA would shard it as it likes, which JAX may have no name for.
    padded = _pad_rows(y0, rows) if isinstance(y0, np.ndarray) else _whole(_pad_rows(_whole(y0, mesh), rows), mesh)
    result = _spread(plan, _laid(padded, mesh, P(AXIS)), run=run, mesh=mesh, backend=backend)
    return _whole(_whole(result, mesh)[:features], mesh)


def _whole(y: Any, mesh: Mesh) -> jax.Array:
    """Features that lie whole on every device of the mesh."""
    return _laid(y, mesh, P())


def _laid(y: Any, mesh: Mesh, spec: P) -> jax.Array:
    """Features that lie on the mesh as `spec` says. Those of the host go straight there: each device gets its part."""
    if not isinstance(y, Tracer):
        return jax.device_put(y, NamedSharding(mesh, spec))
    if AxisType.Explicit in mesh.axis_types:  # there it is part of the type
        return jax.sharding.reshard(y, NamedSharding(mesh, spec))
    return jax.lax.with_sharding_constraint(y, NamedSharding(mesh, spec))


@functools.partial(jax.jit, static_argnames=("run", "mesh", "backend"))
def _spread(plan: Plan, y0: jax.Array, *, run: Callable[..., jax.Array], mesh: Mesh, backend: ops.Backend) -> jax.Array:
    devices = _devices_of(mesh)

    def local(plan: Plan, y: jax.Array) -> jax.Array:
        rows = y.shape[0]
        if rows < _DEALING_ROUNDS * devices:
            return run(plan, y, backend=backend)
        dealt = deal_out(_pad_rows(y, _round_up(rows, devices)), devices)
        return deal_back(run(plan, dealt, backend=backend), devices)[:rows]

    return jax.shard_map(local, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(AXIS))(plan, y0)


def deal_out(y: jax.Array, devices: int) -> jax.Array:
    """Inside `shard_map`: sends row i of each device to device i mod devices.

    Args:
        y: (rows, ...), this device's rows, a multiple of devices.
        devices: Size of the axis `features`.

    Returns:
        As many rows: those of device 0 first, then those of device 1 and so on.
    """
    if devices == 1:
        return y
    by_target = y.reshape(y.shape[0] // devices, devices, *y.shape[1:]).swapaxes(0, 1)
    return _exchange(by_target).reshape(y.shape)


def deal_back(y: jax.Array, devices: int) -> jax.Array:
    """Inside `shard_map`: the reverse of `deal_out`."""
    if devices == 1:
        return y
    by_owner = y.reshape(devices, y.shape[0] // devices, *y.shape[1:])
    return _exchange(by_owner).swapaxes(0, 1).reshape(y.shape)


def _exchange(parts: jax.Array) -> jax.Array:
    """Sends part i of each device to device i; of one axis alone, which JAX transposes right, as a gradient asks."""
    return jax.lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0, tiled=True)


def _pad_rows(y: Any, rows: int) -> Any:
    if y.shape[0] == rows:
        return y
    pad = np.pad if isinstance(y, np.ndarray) else jnp.pad
    return pad(y, ((0, rows - y.shape[0]), (0, 0)))


def _devices_of(mesh: Mesh) -> int:
    if AXIS not in mesh.shape:
        raise ValueError(f"the mesh has the axes {tuple(mesh.shape)}, but none called {AXIS!r}: name one so")
    return int(mesh.shape[AXIS])


def _round_up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# --- from the host, and back ------------------------------------------------------------------------------------------


def share_of_process() -> slice:
    """Which of all features this process reads: every n-th of n processes."""
    return slice(jax.process_index(), None, jax.process_count())


def dealt_rows(features: int, mesh: Mesh) -> np.ndarray:
    """Which feature lies where after `place`, int32 (devices, rows of a device); -1 where a row is padding.

    Process p of n holds the features p, p + n, p + 2 n ..., and deals them round-robin to its devices.
    """
    devices, processes = _devices_of(mesh), jax.process_count()
    own = devices // processes
    device = np.arange(devices)
    first = device // own + processes * (device % own)
    rows = first[:, None] + devices * np.arange(_round_up(features, devices) // devices)
    return np.where(rows < features, rows, -1).astype(np.int32)


def place(share: np.ndarray, features: int, mesh: Mesh) -> jax.Array:
    """Deals features out from host memory, as `dealt_rows` says: no device sees another's.

    Args:
        share: The features of this process, `share_of_process` of all, (own features, width).
        features: Number of all features.
        mesh: The mesh, whose devices stand process by process.

    Returns:
        (devices * rows of a device, width), sharded over `features`, padded with features that are all zero.
    """
    devices = _devices_of(mesh)
    own, rows = devices // jax.process_count(), _round_up(features, devices) // devices

    def part(index: Any) -> np.ndarray:
        device = (index[0].start or 0) // max(rows, 1) % own
        return np.asarray(_pad_rows(np.ascontiguousarray(share[device::own]), rows))

    return jax.make_array_from_callback((devices * rows, *share.shape[1:]), NamedSharding(mesh, P(AXIS)), part)


def collect(results: jax.Array, features: int, mesh: Mesh) -> np.ndarray:
    """The reverse of `place` for results: (features, ...) on the host, in the original order, in every process."""
    rows = dealt_rows(features, mesh).reshape(-1)
    values = to_host(results)
    ordered = np.empty((features, *values.shape[1:]), values.dtype)
    ordered[rows[rows >= 0]] = values[rows >= 0]
    return ordered


def to_host(array: jax.Array) -> np.ndarray:
    """An array of all processes, whole, on the host of each of them."""
    if array.is_fully_addressable:
        return np.asarray(array)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@functools.partial(jax.jit, static_argnames=("features", "mesh", "backend"))
def categories_and_active_dealt(
    plan: Plan, dealt: jax.Array, *, features: int, mesh: Mesh, backend: ops.Backend = "auto"
) -> tuple[jax.Array, jax.Array]:
    """As `categories_and_active`, of features that `place` dealt out. No device talks to another.

    Args:
        plan: The network, from `replicate`.
        dealt: From `place`.
        features: Number of features without the padding.
        mesh: The mesh.
        backend: As for `infer`.

    Returns:
        bool (rows,) in the order of `dealt`, to be given to `collect`, and int32 (devices, plan.layers): the active
        features of each device after each layer, without the padding.
    """

    def local(plan: Plan, y: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        alive, active = ops.categories_and_active(plan, y, backend=backend)
        if not zero_stays_zero(plan.table):
            active -= active_padding(plan, y, rows[0], backend)
        return alive, active[None]

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=(P(AXIS), P(AXIS)))
    return spread(plan, dealt, jnp.asarray(dealt_rows(features, mesh)))


def active_padding(plan: Plan, y: jax.Array, rows: jax.Array, backend: ops.Backend) -> jax.Array:
    """How many of a device's padded rows are active after each layer, int32 (layers,).

    Padded rows are alike, so that one of them, run on its own, tells. Needless where `zero_stays_zero`.

    Args:
        plan: The network, or the piece of it that comes next.
        y: The device's rows.
        rows: int32 (rows,), below 0 where a row is padding.
        backend: As for `infer`.
    """
    padding = rows < 0
    one = jax.lax.dynamic_slice_in_dim(y, jnp.argmax(padding), 1)
    _, active = ops.categories_and_active(plan, one, backend=backend)
    return jnp.sum(padding, dtype=jnp.int32) * active


def zero_stays_zero(table: PlanTable) -> bool:
    """Whether the records alone show that a feature that is all zero stays so in every layer."""
    first, clip = table.layers[0], clip_of(table.layers[0])
    awakes_none = first["bias_offset"] < 0 and min(max(first["bias"], clip.lower), clip.upper) == 0
    return bool(first["prunable"] and awakes_none)


def imbalance(counts: np.ndarray) -> float:
    """The fullest device's count over the mean, 1 where all are empty."""
    return float(counts.max() / counts.mean()) if counts.any() else 1.0
