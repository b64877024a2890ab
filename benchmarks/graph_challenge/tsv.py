"""Reading an official layer: ours, with all checks, against numpy.loadtxt, which only parses; the same files.

    python -m benchmarks.graph_challenge.tsv [--official=FOLDER] [--output=benchmarks/results/tsv.json]

The files: a generated layer of 16,384 neurons (524,288 edges) and, where --official names the folder of
neuron1024.tar.gz, the first layer of the official network of 1024 neurons (32,768 edges).
"""

import argparse
import os
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax.command_line import report
from spdnn_jax.graph_challenge import official_files, radixnet

GENERATED, OFFICIAL = 16384, 1024


def time_in_turn(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, after one call of each that is not timed."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for repeat in range(repeats + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            if repeat:
                times[name].append(time.perf_counter() - start)
    return times


def write_layer(path: Path, neurons: int) -> None:
    """Writes a generated layer in the official form."""
    layer = next(radixnet.layers(neurons, 1))
    outputs = np.repeat(np.arange(neurons), np.diff(layer.indptr))
    with path.open("w") as file:
        file.writelines(f"{i + 1}\t{j + 1}\t{radixnet.WEIGHT:e}\n" for i, j in zip(layer.indices, outputs, strict=True))


def measure(path: Path, neurons: int, repeats: int) -> dict[str, Any]:
    """Times one file and prints the outcome."""
    table = np.loadtxt(path)
    layer = official_files.read_layer(path, neurons)
    np.testing.assert_array_equal(layer.indices, table[:, 0] - 1)  # the files are in order
    times = time_in_turn(
        {
            "ours": lambda: official_files.read_layer(path, neurons),
            "ours, one thread": lambda: official_files.read_layer(path, neurons, threads=1),
            "numpy.loadtxt": lambda: np.loadtxt(path),
        },
        repeats,
    )
    seconds = {name: statistics.median(values) for name, values in times.items()}
    for name, value in seconds.items():
        print(
            f"{path.name}, {layer.edges:,} edges: {name:<17} {value * 1e3:8.3f} ms "
            f"({min(times[name]) * 1e3:.3f} .. {max(times[name]) * 1e3:.3f}), "
            f"{seconds['numpy.loadtxt'] / value:5.1f} x numpy.loadtxt"
        )
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "edges": layer.edges,
        "seconds": seconds,
        "seconds_of_repeats": times,
    }


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", type=Path, help="folder of neuron1024.tar.gz")
    parser.add_argument("--output", default="benchmarks/results/tsv.json")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder, f"generated-n{GENERATED}-l1.tsv")
        write_layer(generated, GENERATED)
        files = [measure(generated, GENERATED, arguments.repeats)]
        if arguments.official:
            member = f"neuron{OFFICIAL}/n{OFFICIAL}-l1.tsv"
            with tarfile.open(arguments.official / f"neuron{OFFICIAL}.tar.gz") as archive:
                archive.extract(member, folder, filter="data")
            files.append(measure(Path(folder, member), OFFICIAL, arguments.repeats))
    result = {
        "device": report.device(),
        "versions": report.versions(),
        "command": "python -m benchmarks.graph_challenge.tsv --official=FOLDER"
        if arguments.official
        else "python -m benchmarks.graph_challenge.tsv",
        "timed": f"from the file, in the page cache, to a checked layer (ours) or a table (numpy.loadtxt); median of "
        f"{arguments.repeats} in turn, after one warm-up each",
        "load_before": load,
        "files": files,
    }
    report.write_json(arguments.output, result)
    print(f"wrote {arguments.output}; load before the start {load:.1f}")


if __name__ == "__main__":
    main()
