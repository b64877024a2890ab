r"""Strong and weak scaling over the GPUs of one host, and what one of up to 1,024 GPUs would have to do.

    python -m benchmarks.distributed.scaling [--networks 16384x120 65536x120] [--output=benchmarks/results/scaling.json]

For each network, on 1, 2, 4, 8 ... devices, as many as there are:

- strong: all features, shared;
- weak: features in proportion to the devices, all of them on all devices;
- exchange: strong, on all devices, with survivors dealt anew once (`--rebalance_after`), beside the same cut without
  it, and with features that are dealt out inside the program;
- alone: on one device, the share of the fullest of D devices, for D up to 1,024. Devices do not talk to each other
  during inference, so this is how long D of them would take; `scaling_model.py` fits it, and checks it.

Categories of every run must equal those of the run on one device. Features are digits, kept in `--cache`, for wide
ones take minutes to make. A dry run without GPUs:

    XLA_FLAGS=--xla_force_host_platform_device_count=4 JAX_PLATFORMS=cpu python -m benchmarks.distributed.scaling \
        --networks 1024x12 --features=2000 --output=/tmp/scaling.json
"""

import argparse
import functools
import inspect
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.results_file import command
from benchmarks.timing import measure
from spdnn_jax import build_plan, categories_sharded
from spdnn_jax.command_line import report
from spdnn_jax.distributed.mesh import AXIS, feature_mesh, imbalance, replicate
from spdnn_jax.distributed.runner import Runner, Settings
from spdnn_jax.graph_challenge import inputs, networks, radixnet
from spdnn_jax.plan import Plan

_PART = 2000  # digits that a process makes at a time


# --- inputs -----------------------------------------------------------------------------------------------------------


def _write_digits(path: str, first: int, count: int, neurons: int) -> None:
    target = np.load(path, mmap_mode="r+")
    target[first : first + count] = inputs.digits(neurons, count, seed=first)


def make_digits(neurons: int, count: int, cache: Path) -> np.ndarray:
    """Digits, uint8 (count, neurons), made on all cores once and mapped from a file; each part has its own seed."""
    path = cache / f"digits-{neurons}-{count}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".part")
        np.lib.format.open_memmap(partial, "w+", np.uint8, (count, neurons)).flush()
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
            parts = [(first, min(_PART, count - first)) for first in range(0, count, _PART)]
            jobs = [pool.submit(_write_digits, str(partial), *part, neurons) for part in parts]
            for job in jobs:
                job.result()
        partial.replace(path)
    return np.load(path, mmap_mode="r")


def make_plan(neurons: int, layers: int, compress: str) -> Plan:
    """The network's plan, in host memory."""
    options: dict[str, Any] = {"compress": compress} if "compress" in inspect.signature(build_plan).parameters else {}
    if compress != "none" and not options:
        raise ValueError(f"--compress={compress}: this version of spdnn_jax knows none only")
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return build_plan(radixnet.layers(neurons, layers), **options)


# --- measuring --------------------------------------------------------------------------------------------------------


class Measured:
    """Repeated runs of a network over features on so many devices."""

    def __init__(self, plan: Plan, y0: np.ndarray, devices: int, repeats: int, **settings: Any) -> None:
        mesh = feature_mesh(devices)
        runner = Runner(plan, mesh, len(y0), Settings(plan.layers, len(y0), **settings), "auto")
        runner.place(y0)
        runner.compile()
        self.alive, self.active = runner.fetch(runner.run())
        self.timing = measure(runner.run, lambda done: done, repeats=repeats, calls=1)
        self.seconds = self.timing.median
        self._plan, self._features = plan, len(y0)

    def record(self, **more: Any) -> dict[str, Any]:
        """What goes into the JSON file."""
        edges, active = self._plan.layer_edges, self.active.sum(axis=0)
        return more | {
            "devices": len(self.active),
            "features": self._features,
            **self.timing.as_record(),
            "nominal_edges_per_second": networks.nominal_edges(self._features, edges) / self.seconds,
            "active_edges_per_second": networks.active_edges(self._features, edges, active) / self.seconds,
            "active": active.tolist(),
            "active_of_devices_at_the_end": self.active[:, -1].tolist(),
            "fullest_over_mean": [imbalance(counts) for counts in self.active.T],
            "categories": int(self.alive.sum()),
        }


def require_equal(alive: np.ndarray, expected: np.ndarray, what: str) -> None:
    """Ends the benchmark where a run gives other categories than one device does."""
    wrong = np.flatnonzero(alive != expected)
    if wrong.size:
        raise SystemExit(f"{what}: {wrong.size} categories differ from those of one device, first {wrong[0] + 1}")


def measure_in_program(plan: Plan, y0: np.ndarray, devices: int, repeats: int, expected: np.ndarray) -> dict[str, Any]:
    """`categories_sharded`, with features in runs at first: the program itself deals them out."""
    mesh = feature_mesh(devices)
    whole = len(y0) // devices * devices
    placed = jax.device_put(np.ascontiguousarray(y0[:whole]), NamedSharding(mesh, P(AXIS)))
    plan = replicate(plan, mesh)
    alive = np.asarray(categories_sharded(plan, placed, mesh))
    require_equal(alive, expected[:whole], f"categories_sharded on {devices} devices")
    run = functools.partial(categories_sharded, plan, placed, mesh)
    return measure(run, jax.block_until_ready, repeats=repeats, calls=1).as_record() | {"features": whole}


def fullest_share(alive: np.ndarray, devices: int) -> slice:
    """The features of the device on which most survive, of so many that features are dealt to round-robin."""
    counts = [int(alive[device::devices].sum()) for device in range(devices)]
    return slice(int(np.argmax(counts)), None, devices)


def measure_network(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All that is measured of one network."""
    neurons, layers = map(int, name.split("x"))
    repeats = arguments.repeats
    start = time.perf_counter()
    plan = make_plan(neurons, layers, arguments.compress)
    y0 = make_digits(neurons, arguments.features, arguments.cache)
    say(f"{name}: {plan.edges:,} edges, {len(y0):,} features, prepared in {time.perf_counter() - start:.0f} s")
    counts = [count for count in (1, 2, 4, 8, 16) if count <= len(jax.devices()[: arguments.devices])]
    runs: list[dict[str, Any]] = []
    one = Measured(plan, y0, 1, repeats)
    for count in counts:
        run = one if count == 1 else Measured(plan, y0, count, repeats)
        require_equal(run.alive, one.alive, f"{name} on {count} devices")
        runs.append(run.record(kind="strong", speedup=one.seconds / run.seconds))
        show(name, runs[-1])
    for count in counts[:-1]:
        part = len(y0) * count // counts[-1]
        run = Measured(plan, y0[:part], count, repeats)
        require_equal(run.alive, one.alive[:part], f"{name}, {part} features on {count} devices")
        runs.append(run.record(kind="weak"))
        show(name, runs[-1])
    exchange: dict[str, Any] = {}
    if counts[-1] > 1:
        for mode in ("never", "always"):
            run = Measured(plan, y0, counts[-1], repeats, rebalance_after=arguments.rebalance_after, rebalance=mode)
            require_equal(run.alive, one.alive, f"{name} cut after {arguments.rebalance_after}, rebalance={mode}")
            exchange[mode] = run.record()
        exchange["in_program"] = measure_in_program(plan, y0, counts[-1], repeats, one.alive)
        seconds = {mode: run["seconds"] for mode, run in exchange.items()}
        say(
            f"{name}: cut after layer {arguments.rebalance_after}: {seconds['never']:.5f} s, with an exchange "
            f"{seconds['always']:.5f} s; dealt in the program {seconds['in_program']:.5f} s"
        )
    alone = []
    for devices in (1, 2, 4, 8, 16, 64, 256, 1024):
        share = fullest_share(one.alive, devices)
        if devices > 1 and len(y0[share]) > 0:
            run = Measured(plan, np.ascontiguousarray(y0[share]), 1, repeats)
            require_equal(run.alive, one.alive[share], f"{name}, the share of one of {devices} devices")
            alone.append(run.record(of=devices))
        elif devices == 1:
            alone.append(one.record(of=1))
    for record in alone:
        say(f"{name}: the fullest of {record['of']:5} devices takes {record['seconds']:.5f} s")
    return {
        "network": name,
        "neurons": neurons,
        "layers": layers,
        "edges": plan.edges,
        "features": len(y0),
        "compress": arguments.compress,
        "runs": runs,
        "exchange": exchange | {"rebalance_after": arguments.rebalance_after},
        "alone": alone,
    }


def say(line: str) -> None:
    """Prints at once: a run may be cut off."""
    print(line, flush=True)


def show(name: str, run: dict[str, Any]) -> None:
    """One run for people."""
    speedup = f"{run['speedup']:5.2f} x one device, " if "speedup" in run else ""
    say(
        f"{name} {run['kind']:6} {run['devices']} devices, {run['features']:6,} features: {run['seconds']:.5f} s "
        f"({run['minimum']:.5f} .. {max(run['repeats']):.5f}), {speedup}"
        f"{report.rate(run['nominal_edges_per_second'])} nominal, "
        f"{report.rate(run['active_edges_per_second'])} active, survivors {run['active_of_devices_at_the_end']}"
    )


def main() -> None:
    """Measures, prints, and writes JSON after every network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["16384x120", "65536x120"])
    parser.add_argument("--features", type=int, default=networks.FEATURES)
    parser.add_argument("--compress", default="none")
    parser.add_argument("--devices", type=int, default=None, help="at most so many; all by default")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rebalance_after", type=int, default=20, help="layer of the exchange")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "spdnn-digits")
    parser.add_argument("--output", default="benchmarks/results/scaling.json")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "device": report.device(),
        "devices": len(jax.devices()),
        "versions": report.versions(),
        "command": command(),
        "timed": f"dealt features on the devices to categories on them; median of {arguments.repeats}, after a warm-up",
        "networks": [],
    }
    for name in arguments.networks:
        result["networks"].append(measure_network(name, arguments))
        report.write_json(arguments.output, result)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
