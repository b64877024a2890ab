"""The benchmark of choices, on whatever device there is: what it compares, keeps and draws."""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import choice, choice_map, peers
from spdnn_jax import costs

SMALL = ("--neurons=64", "--density=0.1,0.5", "--features=1,20", "--repeats=3", "--budget=0.1")


def bench(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["choice.py", *SMALL, *arguments, f"--output={output}"])
    choice.main()
    return json.loads(output.read_text())


def test_everything_is_measured_compared_and_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], on_cpu: None
) -> None:
    content = bench(monkeypatch, tmp_path / "choice.json")
    points = choice_map.points(content)
    assert set(points) == {(64, density, count) for density in (0.1, 0.5) for count in (1, 20)}
    for records in points.values():
        for name in ("kernels", "infer, float32", "dense float32", "JAX BCOO"):
            assert records[name]["largest_difference"] <= 1e-4
    assert (tmp_path / "choice.png").read_bytes()[1:4] == b"PNG"
    assert "slower than 1.1 times the best other at" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    wrong = peers.Peer("JAX BCOO", lambda _, y: lambda: y * 0, lambda _, count: count, jax.block_until_ready, 1e-3)
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    content = bench(monkeypatch, tmp_path / "wrong.json", "--density=0.5")
    records = [record for record in content["records"] if record["contender"] == "JAX BCOO"]
    assert len(records) == 2
    assert all("differs from the kernels'" in record["error"] and "seconds" not in record for record in records)


def test_what_is_too_large_or_too_slow_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cpu: None
) -> None:
    content = bench(monkeypatch, tmp_path / "left.json", "--density=0.5", "--limit=0", "--memory=1e-5")
    errors = {(r["contender"], r["features"]): r.get("error", "") for r in content["records"]}
    assert errors["kernels", 1] == ""
    assert errors["kernels", 20] == "left out: too large"
    content = bench(monkeypatch, tmp_path / "slow.json", "--density=0.5", "--limit=0")
    assert any("it would take" in record.get("error", "") for record in content["records"])
    content = bench(monkeypatch, tmp_path / "none.json", "--time_limit=0")
    assert content["records"] == []


def test_layers_have_the_density_that_was_asked_for() -> None:
    layer = choice.layer_of(300, 0.2).validate()
    assert layer.shape == (300, 300)
    assert layer.edges == pytest.approx(0.2 * 300 * 300, rel=0.05)


def test_the_costs_of_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of an edge and of a weight, from points at which the choice is close alone."""

    def record(contender: str, density: float, seconds: float) -> dict[str, Any]:
        return {
            "contender": contender, "neurons": 1000, "density": density, "features": 8, "edges": 1e6 * density,
            "seconds": seconds, "minimum": seconds,
        }  # fmt: skip

    records = [
        record("kernels", 0.5, 1e-3), record("dense float32", 0.5, 2e-3), record("infer, float32", 0.5, 1e-3),
        record("kernels", 0.1, 1e-4), record("dense float32", 0.1, 2e-3),
    ]  # fmt: skip
    content = {"runs": [{"settings": {"gpu": False}}], "records": records}
    choice_map.print_costs(content)
    said = capsys.readouterr().out
    assert said == "dense float32, narrow, ps by features: 8: 2e+03\nkernels, narrow, ps by features: 8: 2e+03\n"
    assert choice_map.ratios(content, "float32") == {(1000, 0.5, 8): (2.0, "dense")}


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_costs_grow_with_features(device: Any) -> None:
    counts = [1, 2, 8, 100, 512, 5000, 60000, 10**6]
    for curve in (costs.KERNELS[device], *costs.DENSE[device].values()):
        for inputs in (100, 10**5):
            seconds = [float(curve.seconds(np.asarray([inputs]), count)[0]) for count in counts]
            assert sorted(seconds) == seconds
            assert seconds[-1] == pytest.approx(seconds[-2] * 10**6 / 60000)
