"""A report, as a run would make it."""

from spdnn_jax.command_line import report

PROFILE = [
    {"seconds": seconds, "kernel": kernel, "features": 100, "active_edges_per_second": 1e12}
    for seconds, kernel in ((0.002, "grouped"), (7.2e-6, "resident"), (1.5, "resident"))
]


def make_report(**changes: object) -> report.Report:
    """A run of three layers of 10, 20 and 30 edges in two seconds."""
    fields: dict[str, object] = {
        "network": "8 x 3, radixnet weights",
        "neurons": 8,
        "layers": 3,
        "features": 100,
        "inputs": "random",
        "edges": 60,
        "device": "a processor, 2 cores",
        "backend": "cpu",
        "compress": "none",
        "versions": {"jax": "1.2.3"},
        "command": "spdnn --neurons=8",
        "seconds": {"read": 0.25, "compile": 0.5, "inference": 2.0},
        "inference_seconds": [1.0, 2.0, 3.0],
        "active": [50, 5, 0],
        "layer_edges": [10, 20, 30],
        "multiplied_edges": [5, 10, 15],
        "categories": 0,
    }
    return report.Report(**(fields | changes))  # pyright: ignore[reportArgumentType]
