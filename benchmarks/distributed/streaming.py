"""Weights streamed to the device while it computes, beside weights that stay there.

    python -m benchmarks.distributed.streaming [--networks 16384x120] [--output=benchmarks/results/streaming.json]

For each network and each length of a piece: seconds of a run with resident weights in one piece, of one in resident
pieces, of one with streamed pieces, and of copying all pieces without computing. Streaming is hidden where copying is
shorter than computing. `--kind=random` takes networks of random edges, a weight each: they have no row groups, and so
far more bytes to copy.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.results_file import Results
from benchmarks.timing import measure
from spdnn_jax import Plan, SparseLayer, build_plan
from spdnn_jax.distributed import pieces
from spdnn_jax.distributed.mesh import feature_mesh, place
from spdnn_jax.distributed.runner import Runner, Settings
from spdnn_jax.graph_challenge import inputs, networks, radixnet


def random_layers(neurons: int, count: int) -> Iterator[SparseLayer]:
    """Layers of 32 random edges a neuron, of which about half a neuron's survive; no two outputs share their inputs."""
    generator = np.random.default_rng(0)
    indptr = np.arange(neurons + 1, dtype=np.int64) * networks.EDGES_PER_NEURON
    for _ in range(count):
        starts = generator.integers(0, neurons // networks.EDGES_PER_NEURON, indptr[-1])
        places = np.tile(np.arange(networks.EDGES_PER_NEURON), neurons)
        indices = starts + places * (neurons // networks.EDGES_PER_NEURON)  # ascending and distinct inside a row
        values = generator.normal(0.02, 0.3, indices.size).astype(np.float32)
        yield SparseLayer(indptr, indices.astype(np.int32), values, np.asarray(-0.05, np.float32), neurons)


def median_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The median of single calls."""
    return measure(run, jax.block_until_ready, repeats=repeats, calls=1).median


def measure_pieces(plan: Plan, y0: np.ndarray, length: int, whole: Runner, repeats: int) -> dict[str, Any]:
    """One length of a piece."""
    mesh, bounds = feature_mesh(1), pieces.equal_pieces(plan.layers, length)
    dealt = place(y0, len(y0), mesh)

    def run_pieces(parts: Any) -> pieces.Outcome:
        return pieces.run(parts, dealt, table=plan.table, features=len(y0), mesh=mesh, rebalance="never")

    def copy() -> None:
        for piece in pieces.stream(plan, bounds, mesh):
            jax.block_until_ready(piece.words)
            del piece

    resident = pieces.resident(plan, bounds, mesh)
    expected, _ = whole.fetch(whole.run())
    np.testing.assert_array_equal(run_pieces(pieces.stream(plan, bounds, mesh)).alive, expected)
    return {
        "layers_of_a_piece": length,
        "bytes_of_a_piece": max(piece.nbytes for piece in resident),
        "seconds_whole": median_seconds(whole.run, repeats),
        "seconds_resident_pieces": median_seconds(lambda: run_pieces(resident).alive, repeats),
        "seconds_streamed": median_seconds(lambda: run_pieces(pieces.stream(plan, bounds, mesh)).alive, repeats),
        "seconds_copying": median_seconds(copy, repeats),
    }


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=["16384x120"])
    parser.add_argument("--kind", choices=["radixnet", "random"], default="radixnet")
    parser.add_argument("--features", type=int, default=networks.FEATURES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[5, 10, 20, 40, 60])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", default="benchmarks/results/streaming.json")
    arguments = parser.parse_args()
    results = Results(arguments.output, vars(arguments))
    for name in arguments.networks:
        neurons, layers = map(int, name.split("x"))
        make = random_layers if arguments.kind == "random" else radixnet.layers
        with tempfile.TemporaryDirectory() as folder, jax.default_device(jax.local_devices(backend="cpu")[0]):
            path = Path(folder) / "plan.safetensors"
            build_plan(make(neurons, layers)).save(path)
            plan = Plan.open(path)  # the mapping outlives the name
        y0 = inputs.digits(neurons, arguments.features)
        whole = Runner(plan, feature_mesh(1), len(y0), Settings(layers, len(y0)), "auto")
        whole.place(y0)
        whole.compile()
        for length in arguments.lengths:
            if length < layers:
                row = measure_pieces(plan, y0, length, whole, arguments.repeats)
                key = {"section": arguments.kind, "name": name, "contender": f"pieces of {length} layers"}
                results.add(key | {"features": len(y0)} | row)
                print(
                    f"{name} {arguments.kind}, pieces of {length} layers, {row['bytes_of_a_piece'] / 2**20:.2f} MiB: "
                    f"whole {row['seconds_whole']:.5f} s, resident pieces {row['seconds_resident_pieces']:.5f} s, "
                    f"streamed {row['seconds_streamed']:.5f} s "
                    f"({row['seconds_streamed'] / row['seconds_whole']:.2f} x whole), "
                    f"copying alone {row['seconds_copying']:.5f} s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
