"""Runs features through a network on a mesh: in one piece and one pass where all fits, else in several."""

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from spdnn_jax import ops
from spdnn_jax.distributed import pieces
from spdnn_jax.distributed.mesh import categories_and_active_dealt, collect, place, to_host
from spdnn_jax.plan import Plan


@dataclass(frozen=True)
class Settings:
    """How a run is cut and spread.

    Attributes:
        stream_layers: Layers of a streamed piece; as many as the network has to keep all on the device.
        stream_features: Features of a pass, over all devices.
        rebalance_after: Layers after which a network that is not streamed is cut in two; 0 for none.
        rebalance: Whether survivors are dealt anew between pieces.
    """

    stream_layers: int
    stream_features: int
    rebalance_after: int = 0
    rebalance: pieces.Rebalance = "auto"


class Runner:
    """A network on a mesh, with the features that it is to run.

    Every process of a run makes one, of the same plan and settings, and calls its methods in step with the others.
    """

    def __init__(self, plan: Plan, mesh: Mesh, features: int, settings: Settings, backend: ops.Backend) -> None:
        """Puts the network on the devices, unless it is streamed.

        Args:
            plan: The network; with words on the host, if it is to be streamed.
            mesh: The mesh.
            features: Number of all features.
            settings: How the run is cut and spread.
            backend: As for `infer`.
        """
        self._plan, self._mesh, self._features = plan, mesh, features
        self._backend: ops.Backend = backend
        self._settings = settings
        processes = jax.process_count()
        size = -(-settings.stream_features // processes) * processes  # processes have equal shares of each pass
        self._passes = [(first, min(first + size, features)) for first in range(0, features, size)]
        self._streamed = settings.stream_layers < plan.layers
        self._resident: list[Plan] = []
        if not self._streamed:
            after = settings.rebalance_after
            bounds = ((0, after), (after, plan.layers)) if 0 < after < plan.layers else ((0, plan.layers),)
            self._resident = pieces.resident(plan, bounds, mesh)
        self._compiled: dict[int, Any] = {}
        self._placed: Any = None
        self._share = np.zeros((0, 0))

    @property
    def passes(self) -> int:
        """How many passes the features take."""
        return len(self._passes)

    @property
    def streamed(self) -> bool:
        """Whether the weights are copied to the devices in every pass."""
        return self._streamed

    def place(self, share: np.ndarray) -> None:
        """Deals this process's share of the features out to the devices, if all of them fit.

        Args:
            share: (own features, width), `share_of_process` of all.
        """
        self._share = share
        self._placed = jax.block_until_ready(self._place(0)) if self.passes == 1 else None

    def compile(self) -> None:
        """Compiles what a run needs. A network in pieces compiles as it goes: then this is a first run."""
        if len(self._resident) != 1:
            self.run()
            return
        for number, (first, end) in enumerate(self._passes):
            if end - first not in self._compiled:
                lowered = categories_and_active_dealt.lower(
                    self._resident[0],
                    self._placed if self._placed is not None else self._place(number),
                    features=end - first,
                    mesh=self._mesh,
                    backend=self._backend,
                )
                self._compiled[end - first] = lowered.compile(compiler_options=ops.COMPILER_OPTIONS)

    def run(self) -> list[Any]:
        """Runs all features through all layers; returns when it is done. `fetch` reads what it returns."""
        return [self._run_pass(number) for number in range(self.passes)]

    def fetch(self, results: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Reads the results of `run` in every process.

        Returns:
            bool (features,) in the original order, and int32 (devices, layers): active features of each device.
        """
        parts = [self._fetch_pass(number, result) for number, result in enumerate(results)]
        return np.concatenate([alive for alive, _ in parts]), np.sum([active for _, active in parts], axis=0)

    def _place(self, number: int) -> jax.Array:
        first, end = self._passes[number]
        processes = jax.process_count()
        own = self._share[first // processes : -(-end // processes)]
        return place(own, end - first, self._mesh)

    def _run_pass(self, number: int) -> Any:
        first, end = self._passes[number]
        dealt = self._placed if self._placed is not None else self._place(number)
        if self._compiled:
            return jax.block_until_ready(self._compiled[end - first](self._resident[0], dealt))
        return pieces.run(
            self._pieces(),
            dealt,
            table=self._plan.table,
            features=end - first,
            mesh=self._mesh,
            rebalance=self._settings.rebalance,
            backend=self._backend,
        )

    def _pieces(self) -> Any:
        if not self._streamed:
            return self._resident
        return pieces.stream(
            self._plan, pieces.equal_pieces(self._plan.layers, self._settings.stream_layers), self._mesh
        )

    def _fetch_pass(self, number: int, result: Any) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(result, pieces.Outcome):
            return result.alive, result.active
        first, end = self._passes[number]
        alive, active = result
        return collect(alive, end - first, self._mesh), to_host(active)
