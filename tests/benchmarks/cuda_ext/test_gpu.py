"""The GPU benchmark, on whatever device there is: what it times, keeps and prints."""

import json
from pathlib import Path
from typing import Any

import jax
import pytest

from benchmarks import peers
from benchmarks.cuda_ext import gpu, tables
from spdnn_jax import _native

SMALL = ("--networks=64x6", "--widths=64", "--features=300", "--chain=3", "--repeats=3")


@pytest.fixture(autouse=True)
def small_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_TAIL_LAYERS", 5)
    monkeypatch.setattr(gpu, "_TAIL_FEATURES", 20)
    monkeypatch.setattr(gpu, "_COPIED_BYTES", 1 << 20)


def bench(monkeypatch: pytest.MonkeyPatch, output: Path, *arguments: str) -> dict[str, Any]:
    monkeypatch.setattr("sys.argv", ["gpu", *SMALL, *arguments, f"--output={output}"])
    assert gpu.main() == 0
    return json.loads(output.read_text())


def test_everything_is_measured_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bench(monkeypatch, tmp_path / "all.json")
    found = {(r["section"], r["name"], r["contender"]): r for r in content["records"]}
    contenders = [*gpu.FAMILIES, *(peer.name for peer in peers.PEERS)]
    assert {key[2] for key in found if key[:2] == ("layers", "64 challenge")} == set(contenders)
    assert {key[2] for key in found if key[:2] == ("layers", "64 random")} == set(contenders)
    assert {key[2] for key in found if key[0] == "tail"} == {"auto", *gpu.FAMILIES}
    absent = {"cuSPARSE", "TF32"} if _native.cuda_unavailable_reason() else set()  # they need a GPU
    for key, record in found.items():
        if not any(word in key[2] for word in absent):
            assert "error" not in record, record
            assert 0 < record["minimum"] <= record["seconds"]
    network = found["networks", "64x6", "none"]
    assert network["nominal_edges_per_second"] == pytest.approx(300 * 6 * 64 * 32 / network["seconds"])
    assert network["active_edges_per_second"] < network["nominal_edges_per_second"], "some features died"
    layer = found["layers", "64 random", "grouped"]
    assert layer["active_edges_per_second"] == pytest.approx(300 * 64 * 32 / layer["seconds"])


def test_a_peer_with_a_wrong_result_is_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A contender that computes something else would win any race."""
    wrong = peers.Peer("zeros", lambda _, y: lambda: y * 0, lambda _, count: count, jax.block_until_ready, 1e-3)
    monkeypatch.setattr(peers, "PEERS", (wrong,))
    content = bench(monkeypatch, tmp_path / "wrong.json", "--only=layers", "--patterns=random")
    (record,) = (record for record in content["records"] if record["contender"] == "zeros")
    assert "differs from ours" in record["error"]
    assert "seconds" not in record


def test_layers_whose_features_die_are_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu._PATTERNS, "challenge", lambda neurons: list(gpu.radixnet.layers(neurons, 4)))
    monkeypatch.setattr(peers, "PEERS", ())
    content = bench(monkeypatch, tmp_path / "dead.json", "--only=layers", "--patterns=challenge", "--chain=20")
    assert all("features died" in record["error"] for record in content["records"])


def test_the_time_limit_keeps_what_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "part.json"
    bench(monkeypatch, output, "--only=ceilings")
    content = bench(monkeypatch, output, "--only=tail", "--time_limit=0")
    assert [record["section"] for record in content["records"]] == ["ceilings"]
    assert [run["settings"]["only"] for run in content["runs"]] == [["ceilings"], ["tail"]]


@pytest.mark.parametrize("flag", ["--only=nothing", "--networks=1024", "--compress=best", "--patterns=stripes"])
def test_bad_flags(flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["gpu", flag])
    with pytest.raises(SystemExit) as stopped:
        gpu.main()
    assert stopped.value.code == 2
    assert flag.partition("=")[2] in capsys.readouterr().err


@pytest.mark.parametrize(("neurons", "most"), [(1024, 60000), (65536, 20000)])
def test_peers_take_fewer_features_where_memory_ends(neurons: int, most: int) -> None:
    layer = gpu._challenge_layers(neurons)[0]
    for peer in peers.PEERS:
        count = peer.features(layer, 60000)
        assert 128 <= count <= most
        assert 4 * count * neurons <= 4e9


def test_tables(tmp_path: Path) -> None:
    records = [
        {
            "section": "networks", "name": "1024x120", "contender": "none", "inputs": "mnist", "features": 60000,
            "seconds": 0.00094, "minimum": 0.0009, "nominal_edges_per_second": 2.5e14,
            "active_edges_per_second": 1.1e13, "paper_seconds": 0.0113, "speedup": 0.0113 / 0.00094,
        },
        {
            "section": "layers", "name": "1024 random", "contender": "grouped", "features": 60000,
            "seconds": 1e-4, "minimum": 1e-4, "active_edges_per_second": 4.56e12,
        },
        {
            "section": "layers", "name": "4096 random", "contender": "JAX BCOO", "features": 128,
            "seconds": 1e-4, "minimum": 1e-4, "active_edges_per_second": 5e10,
        },
        {"section": "layers", "name": "1024 random", "contender": "JAX BCOO", "error": "out of memory"},
    ]  # fmt: skip
    text = tables.markdown({"device": "a card", "versions": {"jax": "1"}, "records": records})
    row = "| 1024 x 120 | none | 60,000 mnist | 940 us | 900 us | 250 TE/s | 11 TE/s | 11.3 ms | 12.0 x |"
    assert row in text
    assert "| 60,000 features | 1024 random | 4096 random |\n| --- | ---: | ---: |\n| grouped | 4.56 | - |" in text
    assert "| JAX BCOO | - | 0.05 (128 features) |" in text
    assert "- layers 1024 random JAX BCOO: out of memory" in text
