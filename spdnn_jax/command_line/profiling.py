"""Times a plan layer by layer: a separate run, which waits for the device after every layer."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from spdnn_jax import ops, planner
from spdnn_jax.plan import Plan

_REPEATS = 3


@dataclass(frozen=True)
class LayerProfile:
    """What one layer took.

    Attributes:
        seconds: The least of a few calls, from activations on the device until the device is done: the call itself,
            reading the activations, and the layer. Layers that the whole network fuses stand alone here, so that the
            sum is more than the network's time.
        kernel: CUDA kernel family, or the back end where that has no families.
        features: Features in work: those active before the layer, and all where a bias may bring them to life.
        active_edges_per_second: Features in work times multiplied edges, by the seconds.
    """

    seconds: float
    kernel: str
    features: int
    active_edges_per_second: float


def profile_layers(
    plan: Plan, y0: jax.Array | np.ndarray, *, backend: str, progress: Callable[[int], None] | None = None
) -> list[LayerProfile]:
    """Runs a plan layer by layer.

    Args:
        plan: The network.
        y0: The features, as for `infer`.
        backend: "cuda", "cpu" or "xla", as the app names them.
        progress: Called after each layer with the number of layers done.

    Returns:
        The layers' profiles, in order.

    Raises:
        ValueError: y0 has another width or dtype.
    """
    families = _families(plan, len(y0)) if backend == "cuda" else [backend] * plan.layers
    path: ops.Backend = "xla" if backend == "xla" else "auto"
    y = jax.device_put(y0)
    profiles: list[LayerProfile] = []
    for number, (part, kernel) in enumerate(zip(plan.split(1), families, strict=True), start=1):
        features = y.shape[0]
        seconds = _seconds(part, y, path) if features else 0.0
        rate = features * int(part.multiplied_edges.sum()) / seconds if seconds else 0.0
        profiles.append(LayerProfile(seconds, kernel, features, rate))
        y = _live_outputs(part, y, path)
        if progress is not None:
            progress(number)
    return profiles


def _families(plan: Plan, features: int) -> list[str]:
    return list(planner.schedule(plan.table, plan.kernel, features=features).families)


def _seconds(part: Plan, y: jax.Array, path: ops.Backend) -> float:
    times = []
    for _ in range(_REPEATS + 1):  # the first, which compiles, is hardly the least
        start = time.perf_counter()
        jax.block_until_ready(ops.categories(part, y, backend=path))
        times.append(time.perf_counter() - start)
    return min(times)


def _live_outputs(part: Plan, y: jax.Array, path: ops.Backend) -> jax.Array:
    """The layer's activations, without the features that are dead from here on."""
    if y.shape[0] == 0:
        return jnp.zeros((0, part.outputs), jnp.float32)
    alive = np.asarray(ops.categories(part, y, backend=path))
    y = ops.infer(part, y, backend=path)
    if alive.all() or not part.table.layers["prunable"][0]:
        return y
    return y[np.flatnonzero(alive)]
