"""The commands beside `run`, end to end."""

import json
from pathlib import Path

from spdnn_jax.graph_challenge import download
from tests.command_line.program import SMALL, error_line, spdnn, started


def test_profile_and_plot(tmp_path: Path) -> None:
    report, figure = tmp_path / "report.json", tmp_path / "figure.png"
    done = spdnn(*SMALL, "--profile_layers", f"--report_out={report}")
    assert "layer 1 alone" in done.stdout
    content = json.loads(report.read_text())
    assert [layer["features"] for layer in content["profile"]] == [200, *content["active"][:-1]]
    for kind, call in (("layers", started), ("networks", spdnn)):
        done = call("plot", str(report), f"--output={figure}", f"--figure={kind}")
        assert done.returncode == 0, done.stderr
        assert figure.read_bytes().startswith(b"\x89PNG")
        figure.unlink()


def test_bench_gathers_reports(tmp_path: Path) -> None:
    flagfile = tmp_path / "small.flags"
    flagfile.write_text("\n".join(SMALL) + "\n")
    gathered = tmp_path / "all.json"
    done = started("bench", str(flagfile), str(flagfile), "--check=none", f"--report_out={gathered}")
    assert done.returncode == 0, done.stderr
    assert [report["features"] for report in json.loads(gathered.read_text())] == [200, 200]


def test_download_reaches_a_server(tmp_path: Path) -> None:
    done = spdnn("download", "--neurons=64", "--base_url=http://127.0.0.1:9", f"--dataset_dir={tmp_path}/new")
    assert "http://127.0.0.1:9/dnn/neuron64.tar.gz" in error_line(done)
    assert download.official_paths(64, 120)[0] == "dnn/neuron64.tar.gz"
