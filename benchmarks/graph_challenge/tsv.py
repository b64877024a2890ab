"""Reading an official layer: ours, with all checks, against numpy.loadtxt, which only parses; the same files.

    python -m benchmarks.graph_challenge.tsv [--official=FOLDER] [--output=benchmarks/results/tsv.json]

The files: a generated layer of 16,384 neurons (524,288 edges) and, where --official names the folder of
neuron1024.tar.gz, the first layer of the official network of 1024 neurons (32,768 edges).
"""

import argparse
import tarfile
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.results_file import Results
from benchmarks.timing import measure_in_turn
from spdnn_jax.graph_challenge import official_files, radixnet

GENERATED, OFFICIAL = 16384, 1024
LOADTXT = "numpy.loadtxt"


def write_layer(path: Path, neurons: int) -> None:
    """Writes a generated layer in the official form."""
    layer = next(radixnet.layers(neurons, 1))
    outputs = np.repeat(np.arange(neurons), np.diff(layer.indptr))
    with path.open("w") as file:
        file.writelines(f"{i + 1}\t{j + 1}\t{radixnet.WEIGHT:e}\n" for i, j in zip(layer.indices, outputs, strict=True))


def measure(path: Path, neurons: int, repeats: int, results: Results) -> None:
    """Times one file, which is in the page cache; keeps and prints the outcome."""
    table = np.loadtxt(path)
    layer = official_files.read_layer(path, neurons)
    np.testing.assert_array_equal(layer.indices, table[:, 0] - 1)  # the files are in order
    contenders = {
        "ours": lambda: official_files.read_layer(path, neurons),
        "ours, one thread": lambda: official_files.read_layer(path, neurons, threads=1),
        LOADTXT: lambda: np.loadtxt(path),
    }
    record = {"section": "read", "name": path.name, "bytes": path.stat().st_size, "edges": layer.edges}
    timings = measure_in_turn(contenders, repeats)
    for name, timing in timings.items():
        results.add({**record, "contender": name, **timing.as_record()})
        print(
            f"{path.name}, {layer.edges:,} edges: {name:<17} {timing.median * 1e3:8.3f} ms "
            f"({min(timing.seconds) * 1e3:.3f} .. {max(timing.seconds) * 1e3:.3f}), "
            f"{timings[LOADTXT].median / timing.median:5.1f} x {LOADTXT}"
        )


def main() -> None:
    """Measures, prints and writes JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--official", help="folder of neuron1024.tar.gz")
    parser.add_argument("--output", default="benchmarks/results/tsv.json")
    parser.add_argument("--repeats", type=int, default=15)
    arguments = parser.parse_args()
    results = Results(arguments.output, vars(arguments))
    with tempfile.TemporaryDirectory() as folder:
        generated = Path(folder, f"generated-n{GENERATED}-l1.tsv")
        write_layer(generated, GENERATED)
        measure(generated, GENERATED, arguments.repeats, results)
        if arguments.official:
            member = f"neuron{OFFICIAL}/n{OFFICIAL}-l1.tsv"
            with tarfile.open(Path(arguments.official, f"neuron{OFFICIAL}.tar.gz")) as archive:
                archive.extract(member, folder, filter="data")
            measure(Path(folder, member), OFFICIAL, arguments.repeats, results)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
