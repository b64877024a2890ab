"""A network run piece by piece: for weights larger than device memory, and to even out what survives on each device.

A piece is a stretch of layers, laid out as a plan of its own. Between pieces dead features are dropped, and the host
learns how many are left on each device: that is when survivors can be dealt anew. Pieces that do not fit on the device
together are streamed: the next one is copied while this one computes (arXiv 2007.14152).
"""

import functools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import ops
from spdnn_jax.distributed.mesh import (
    AXIS,
    active_padding,
    deal_out,
    dealt_rows,
    replicate,
    to_host,
    zero_stays_zero,
)
from spdnn_jax.layout import PlanTable
from spdnn_jax.plan import Plan

Rebalance = Literal["auto", "always", "never"]
"""Whether survivors are dealt anew between pieces: where `exchange_pays`, wherever some may be dropped, or never."""

# --- which pieces -----------------------------------------------------------------------------------------------------


def equal_pieces(layers: int, length: int) -> tuple[tuple[int, int], ...]:
    """Pieces (first layer, end) of so many layers each; the last may be shorter.

    Raises:
        ValueError: length is not positive.
    """
    if length < 1:
        raise ValueError(f"a piece needs at least one layer, got {length}")
    return tuple((first, min(first + length, layers)) for first in range(0, layers, length))


def resident(plan: Plan, bounds: Sequence[tuple[int, int]], mesh: Mesh) -> list[Plan]:
    """The pieces of a plan, all of them on every device of the mesh."""
    return [replicate(plan.cut(*piece), mesh) for piece in bounds]


def stream(plan: Plan, bounds: Sequence[tuple[int, int]], mesh: Mesh) -> Iterator[Plan]:
    """The pieces of a plan one by one, each on every device of the mesh; the next is copied while one is in use.

    No more than two are on the devices at a time, if the caller lets go of one before it asks for the next. They pass
    through pinned host memory where the devices have such, so that copying and computing overlap.

    Args:
        plan: The network, with words in host memory or mapped from a file (`Plan.open`).
        bounds: First layer and end of each piece.
        mesh: The mesh.
    """

    def copy(first: int, end: int) -> Plan:
        return _through_pinned_memory(plan.cut(first, end), mesh)

    with ThreadPoolExecutor(1, thread_name_prefix="spdnn-stream") as copier:  # cutting a piece out is work on the host
        following = copier.submit(copy, *bounds[0])
        for after in [*bounds[1:], None]:
            piece = following.result()
            if after is not None:
                following = copier.submit(copy, *after)
            yield piece


def _through_pinned_memory(piece: Plan, mesh: Mesh) -> Plan:
    kinds = {memory.kind for memory in mesh.devices.flat[0].addressable_memories()}
    if "pinned_host" not in kinds:
        return replicate(piece, mesh)
    words: Any = piece.words
    pinned = NamedSharding(mesh, P(), memory_kind="pinned_host")
    staged = jax.make_array_from_callback(words.shape, pinned, lambda index: words[index])
    # Each device copies its own: XLA before jax 0.10.2 has no program that does so in several processes.
    copies = [jax.device_put(shard.data, SingleDeviceSharding(shard.device)) for shard in staged.addressable_shards]
    on_devices = jax.make_array_from_single_device_arrays(words.shape, NamedSharding(mesh, P()), copies)
    return Plan(on_devices, piece.table, piece.kernel)


# --- what fits --------------------------------------------------------------------------------------------------------

_USABLE = 0.9  # of a device's memory: the rest is XLA's own
_WEIGHTS = 0.5  # of the usable memory, at most


@dataclass(frozen=True)
class Fit:
    """What device memory has room for.

    Attributes:
        layers: Layers of a piece; as many as the network has where all of it fits.
        features: Features of a pass, over all devices; as many as there are where all of them fit.
    """

    layers: int
    features: int


def fit(table: PlanTable, features: int, feature_bytes: int, devices: int, memory: int | None) -> Fit:
    """How a network and its features are to be cut so that they fit.

    The weights get half of the memory at most: a network larger than that is streamed, through two buffers. Features
    get what is left, for their input, the two buffers of a layer, and the activations between pieces.

    Args:
        table: The network's records.
        features: Number of features.
        feature_bytes: Bytes of one feature as it is given.
        devices: How many devices share the features.
        memory: Bytes of a device, None where it is not known: then all fits.

    Raises:
        ValueError: A single layer, or a single feature, does not fit.
    """
    layers = len(table.layers)
    if memory is None:
        return Fit(layers, features)
    usable = int(memory * _USABLE)
    weights, whole = int(table.header["words"]) * 4, True
    widest = int(max(table.layers["inputs"].max(), table.layers["outputs"].max()))
    if weights > usable * _WEIGHTS:
        largest = int(table.layers["words"].max()) * 4
        layers, whole = min(layers, int(usable * _WEIGHTS) // (2 * largest)), False
        weights = 2 * layers * largest
    room = usable - weights
    # XLA may hold two sets of activations between pieces beside the workspace, and the compacted one
    per_feature = feature_bytes + (2 if whole else 5) * 4 * widest
    fitting = room // per_feature * devices
    if layers < 1 or fitting < 1:
        raise ValueError(
            f"{'a layer' if layers < 1 else 'a feature'} of this network does not fit into {memory / 2**20:,.0f} MiB "
            "of device memory: use a device with more"
        )
    return Fit(layers, min(features, int(fitting)))


def memory_of(mesh: Mesh) -> int | None:
    """Bytes of memory that JAX may use on each device of the mesh, or None where the back end does not say."""
    limits = [(device.memory_stats() or {}).get("bytes_limit", 0) for device in mesh.local_devices]
    return min(limits) or None


# --- running ----------------------------------------------------------------------------------------------------------

# An H100: edges that it multiplies in a second where few features are left, bytes that it sends, and what an exchange
# costs before the first byte. A CPU is slower by about the same factor in the first two.
_EDGES_PER_SECOND = 2e12
_BYTES_PER_SECOND = 1e11
_EXCHANGE_SECONDS = 1e-4


def exchange_pays(counts: np.ndarray, width: int, edges_left: int) -> bool:
    """Whether dealing survivors anew saves more than it costs.

    All devices wait for the fullest. What it has above the mean is multiplied with all edges that are left; an exchange
    sends its survivors' activations once. With features dealt round-robin the surplus is about sqrt(2 n log(d) / d) for
    n survivors on d devices, a few percent; so it pays for wide and deep networks only, or an input in clumps.

    Args:
        counts: Survivors on each device, (devices,).
        width: Neurons at this point.
        edges_left: Edges that a feature is still to be multiplied with.
    """
    surplus = float(counts.max() - counts.mean())
    saved = surplus * edges_left / _EDGES_PER_SECOND
    return saved > _EXCHANGE_SECONDS + float(counts.max()) * width * 4 / _BYTES_PER_SECOND


@dataclass
class Outcome:
    """What `run` finds out.

    Attributes:
        alive: bool (features,): the categories.
        active: int32 (devices, layers): active features of each device after each layer.
        activations: float32 (features, outputs), or None where not asked for.
        exchanges: Layers (counted from 1) after which survivors were dealt anew.
    """

    alive: np.ndarray
    active: np.ndarray
    activations: np.ndarray | None
    exchanges: list[int]


def run(
    pieces: Iterable[Plan],
    dealt: jax.Array,
    *,
    table: PlanTable,
    features: int,
    mesh: Mesh,
    rebalance: Rebalance = "auto",
    activations: bool = False,
    backend: ops.Backend = "auto",
) -> Outcome:
    """Runs a network piece by piece.

    The result equals that of `infer` and `categories`. Between pieces the host waits for the devices: pieces should be
    long beside a launch.

    Args:
        pieces: The pieces in order, from `resident` or `stream`.
        dealt: The features, from `place`.
        table: The records of the whole network.
        features: Number of features without padding.
        mesh: The mesh.
        rebalance: Whether survivors are dealt anew between pieces.
        activations: Whether the activations are wanted, too.
        backend: As for `infer`.
    """
    y, rows = dealt, jax.device_put(dealt_rows(features, mesh).reshape(-1), NamedSharding(mesh, P(AXIS)))
    wakes = not zero_stays_zero(table)
    layers, done = len(table.layers), 0
    active: list[jax.Array] = []
    exchanges: list[int] = []
    alive: Any = None
    for piece in pieces:
        done += piece.layers
        wanted = activations or done < layers
        y, alive, counts, here = _run_piece(piece, y, rows, mesh=mesh, backend=backend, activations=wanted, wakes=wakes)
        active.append(here)
        del piece, here  # before the next one comes: no more than two pieces are held
        if done < layers and table.layers[done - 1]["prunable"]:
            survivors = np.asarray(counts)
            edges_left = int(table.layers["multiplied_edges"][done:].sum())
            exchange = _exchanges(rebalance, survivors, y.shape[1], edges_left)
            capacity = _capacity(int(survivors.max()), mesh.size if exchange else 1)
            if exchange:
                exchanges.append(done)
            if exchange or capacity < y.shape[0] // mesh.size:
                y, rows = _drop_dead(y, alive, rows, capacity=capacity, exchange=exchange, mesh=mesh)
    return _outcome(y if activations else None, alive, rows, active, features, exchanges)


def _exchanges(rebalance: Rebalance, survivors: np.ndarray, width: int, edges_left: int) -> bool:
    if rebalance == "auto":
        return exchange_pays(survivors, width, edges_left)
    return rebalance == "always" and survivors.size > 1


def _capacity(count: int, multiple: int) -> int:
    """Rows for so many survivors: in steps of an eighth, so that few sizes are ever compiled."""
    eighth = 1 << max(0, count.bit_length() - 4)
    step = -(-eighth // multiple) * multiple
    return -(-max(count, 1) // step) * step


@functools.partial(jax.jit, static_argnames=("mesh", "backend", "activations", "wakes"))
def _run_piece(
    piece: Plan,
    y: jax.Array,
    rows: jax.Array,
    *,
    mesh: Mesh,
    backend: ops.Backend,
    activations: bool,
    wakes: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Activations, which rows are alive, survivors of each device (on all of them), and active features by layer."""

    def local(piece: Plan, y: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        if activations:
            result, alive, active = ops.activations_and_active(piece, y, backend=backend)
        else:
            alive, active = ops.categories_and_active(piece, y, backend=backend)
            result = jnp.zeros_like(y, shape=(y.shape[0], 0), dtype=jnp.float32)
        if wakes:
            active -= active_padding(piece, y, rows, backend)
        own = jnp.zeros((mesh.size,), jnp.int32).at[jax.lax.axis_index(AXIS)].set(active[-1])
        return result, alive & (rows >= 0), jax.lax.psum(own, AXIS), active[None]

    spread = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(AXIS), P(AXIS)), out_specs=(P(AXIS), P(AXIS), P(), P(AXIS))
    )
    return spread(piece, y, rows)


@functools.partial(jax.jit, static_argnames=("capacity", "exchange", "mesh"))
def _drop_dead(
    y: jax.Array, alive: jax.Array, rows: jax.Array, *, capacity: int, exchange: bool, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Moves each device's survivors to the front of `capacity` rows, and deals them out anew."""

    def local(y: jax.Array, alive: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        (kept,) = jnp.nonzero(alive, size=capacity, fill_value=y.shape[0])
        y = y.at[kept].get(mode="fill", fill_value=0)
        rows = rows.at[kept].get(mode="fill", fill_value=-1)
        if exchange:
            y, rows = (deal_out(part, mesh.size) for part in (y, rows))
        return y, rows

    spread = jax.shard_map(local, mesh=mesh, in_specs=(P(AXIS), P(AXIS), P(AXIS)), out_specs=(P(AXIS), P(AXIS)))
    return spread(y, alive, rows)


def _outcome(
    y: jax.Array | None,
    alive: jax.Array,
    rows: jax.Array,
    active: list[jax.Array],
    features: int,
    exchanges: list[int],
) -> Outcome:
    held, living = to_host(rows), to_host(alive)
    categories = np.zeros(features, bool)
    categories[held[living]] = True
    activations = None
    if y is not None:
        activations = np.zeros((features, y.shape[1]), np.float32)
        activations[held[held >= 0]] = to_host(y)[held >= 0]
    return Outcome(categories, np.concatenate([to_host(part) for part in active], axis=1), activations, exchanges)
