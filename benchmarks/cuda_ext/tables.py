"""Markdown tables of what `gpu.py` measured.

python -m benchmarks.cuda_ext.tables [benchmarks/results/h100.json]
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spdnn_jax.command_line import report

Record = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns after the first are flush right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, rule, *rows))


def markdown(content: dict[str, Any]) -> str:
    """All tables of a results file, each under its title.

    Args:
        content: What `gpu.py` wrote.
    """
    records: list[Record] = content["records"]
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    parts = [f"{content['device']}; {versions}"]
    for section, title, make in (
        ("networks", "Networks, from features to categories", _networks),
        ("layers", "One layer, active TE/s", _layers),
        ("tail", "A tail", _tail),
        ("ceilings", "Ceilings", _ceilings),
    ):
        chosen = [record for record in records if record["section"] == section]
        if chosen:
            parts.append(f"{title}\n\n{make(chosen)}")
    failed = [f"- {r['section']} {r['name']} {r['contender']}: {r['error']}" for r in records if "error" in r]
    if failed:
        parts.append("Not measured\n\n" + "\n".join(failed))
    return "\n\n".join(parts)


def _networks(records: list[Record]) -> str:
    head = ("network", "compress", "inputs", "median", "least", "nominal", "active", "the paper's code", "ratio")
    rows = [
        (
            record["name"].replace("x", " x "),
            record["contender"],
            f"{record['features']:,} {record['inputs']}",
            report.duration(record["seconds"]),
            report.duration(record["minimum"]),
            report.rate(record["nominal_edges_per_second"]),
            _or_dash(record["active_edges_per_second"], report.rate),
            _or_dash(record["paper_seconds"], report.duration),
            _or_dash(record["speedup"], lambda ratio: f"{ratio:.1f} x"),
        )
        for record in sorted(measured(records, "networks"), key=lambda record: [*map(int, record["name"].split("x"))])
    ]
    return table(head, rows)


def _layers(records: list[Record]) -> str:
    """A row for each contender, a column for each kind of layer; the features where they are fewer than the most."""
    names = kinds_of(records)
    contenders = list(dict.fromkeys(record["contender"] for record in records))
    most = max((record["features"] for record in measured(records, "layers")), default=0)
    cells = {
        (record["contender"], record["name"]): f"{record['active_edges_per_second'] / 1e12:.3g}"
        + (f" ({record['features']:,} features)" if record["features"] < most else "")
        for record in measured(records, "layers")
    }
    rows = [(name, *(cells.get((name, kind), "-") for kind in names)) for name in contenders]
    return f"{table((f'{most:,} features', *names), rows)}"


def _tail(records: list[Record]) -> str:
    head = ("", "kernel", "by layer", "least", "active")
    rows = [
        (
            record["name"],
            record["contender"],
            report.duration(record["seconds"]),
            report.duration(record["minimum"]),
            report.rate(record["active_edges_per_second"]),
        )
        for record in measured(records, "tail")
    ]
    return table(head, rows)


def _ceilings(records: list[Record]) -> str:
    rows = [
        (f"{record['name']}, {record['contender']}", f"{record['bytes_per_second'] / 1e9:,.0f} GB/s")
        for record in measured(records, "ceilings")
    ]
    return table(("", "read and written"), rows)


def measured(records: list[Record], section: str) -> list[Record]:
    """Those of a section that were measured."""
    return [record for record in records if record["section"] == section and "error" not in record]


def kinds_of(records: list[Record]) -> list[str]:
    """The kinds of layers, by pattern, then width."""
    return sorted({record["name"] for record in records}, key=lambda name: (name.split()[1], int(name.split()[0])))


def _or_dash(value: float | None, text: Any) -> str:
    return "-" if value is None else text(value)


if __name__ == "__main__":
    path = Path(sys.argv[1] if len(sys.argv) > 1 else "benchmarks/results/h100.json")
    print(markdown(json.loads(path.read_text(encoding="utf-8"))))
