"""Reading one layer in the official format (N = 16384, 524,288 edges): pyarrow against numpy.loadtxt, the same file.

python benchmarks/tsv.py
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax import official_files, radixnet, report

NEURONS = 16384


def seconds(run: Callable[[], Any]) -> float:
    """Best of three: file reading is disturbed upward only."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Measures and prints."""
    layer = next(radixnet.layers(NEURONS, 1))
    outputs = np.repeat(np.arange(NEURONS), np.diff(layer.indptr))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.tsv"
        with path.open("w") as file:
            file.writelines(
                f"{i + 1}\t{j + 1}\t{radixnet.WEIGHT:e}\n" for i, j in zip(layer.indices, outputs, strict=True)
            )
        ours = seconds(lambda: official_files.read_layer(path, NEURONS))
        loadtxt = seconds(lambda: np.loadtxt(path))
    result = {"edges": layer.edges, "ours": ours, "numpy.loadtxt": loadtxt, "versions": report.versions()}
    report.write_json("benchmarks/results/tsv.json", result)
    print(f"ours {ours:.4f} s, with checks and sorting; numpy.loadtxt {loadtxt:.4f} s: {loadtxt / ours:.1f} x")


if __name__ == "__main__":
    main()
