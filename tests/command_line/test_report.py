"""The report of a run: its figures, the table, JSON, plots, progress."""

from pathlib import Path

import pytest

from spdnn_jax.command_line import report


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


def test_edges_per_second() -> None:
    """Active edges count the features *before* each layer, and the edges that are left of a compressed network."""
    result = make_report()
    assert result.nominal_edges_per_second == 100 * 60 / 2
    assert result.active_edges_per_second == (100 * 5 + 50 * 10 + 5 * 15) / 2


def test_no_active_edges_are_claimed_where_features_were_merged() -> None:
    """How many features were multiplied is not counted there; the number of active ones would overstate the speed."""
    result = make_report(compress="full")
    assert result.active_edges_per_second is None
    assert "not known" in result.table()


def test_table_says_what_was_measured() -> None:
    lines = dict(line.split("  ", 1) for line in make_report(check="as it should be").table().splitlines())
    rows = {name.strip(): text.strip() for name, text in lines.items()}
    assert rows["network"] == "8 x 3, radixnet weights: 60 edges"
    assert rows["back end"] == "cpu on a processor, 2 cores, --compress=none"
    assert rows["multiplied"] == "50.0% of the edges"
    assert rows["read"] == "0.25 s"
    assert rows["inference"] == "2 s, median of 3: device-resident input to categories"
    assert rows["after layer 1"] == "50 active"
    assert rows["after layer 3"] == "0 active"
    assert rows["check"] == "as it should be"
    assert "truth" not in rows


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        (1, [1]),
        (3, [1, 3]),
        (25, [1, 10, 20, 25]),
        (120, [1, *range(10, 121, 10)]),
        (1920, [1, 10, 20, 30, 40, 50, *range(160, 1921, 160)]),
    ],
)
def test_shown_layers(layers: int, shown: list[int]) -> None:
    assert report.shown_layers(layers) == shown


@pytest.mark.parametrize(
    ("edges_per_second", "text"),
    [(2.5e8, "0.25 GE/s"), (69.12e9, "69.12 GE/s"), (999e9, "999 GE/s"), (2.1e13, "21 TE/s")],
)
def test_rate(edges_per_second: float, text: str) -> None:
    assert report.rate(edges_per_second) == text


def test_json_holds_every_field_and_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    result = make_report(seconds={"inference": 1 / 3})
    result.write(path)
    assert report.read_reports([path]) == [vars(result)]
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_file_may_hold_many_reports(tmp_path: Path) -> None:
    one, many = tmp_path / "one.json", tmp_path / "many.json"
    make_report(features=1).write(one)
    report.write_json(many, [vars(make_report(features=features)) for features in (2, 3)])
    assert [content["features"] for content in report.read_reports([one, many])] == [1, 2, 3]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{}", '{"network": "x"}', "1\n2\n"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"{path}.*--report_out"):
        report.read_reports([path])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.parametrize("name", ["report.json", "figure.png"])
def test_a_write_that_fails_at_the_end_leaves_nothing(tmp_path: Path, name: str) -> None:
    """A folder of the target's name lets the content be written beside it, and refuses the last step."""
    (tmp_path / name).mkdir()
    with pytest.raises(OSError, match=name):
        if name == "report.json":
            make_report().write(tmp_path / name)
        else:
            report.plot_layers([vars(make_report())], tmp_path / name)
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_plot_draws_active_features_and_multiplied_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", figures.append)
    report.plot_layers([vars(make_report())], tmp_path / "figure.png")
    features, edges = (axis.lines[0] for axis in figures[0].axes)
    assert features.get_ydata().tolist() == [50, 5, 0]
    assert edges.get_ydata().tolist() == [100 * 5, 50 * 10, 5 * 15]
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_plot_of_networks_has_the_paper_s_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of one compression each; the paper's only where the work is the same."""
    figures = []
    monkeypatch.setattr(pytest.importorskip("matplotlib.pyplot"), "close", figures.append)
    sizes = [(4096, 120), (1024, 480), (1024, 120)]
    runs = [
        vars(make_report(neurons=n, layers=k, features=60000, compress=compress))
        for n, k in sizes
        for compress in ("none", "full")
    ]
    report.plot_networks(runs, tmp_path / "figure.png")
    report.plot_networks([vars(make_report())], tmp_path / "small.png")
    axis, small = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1024x120", "1024x480", "4096x120"]
    none, full, paper = axis.lines
    assert none.get_xdata().tolist() == full.get_xdata().tolist() == [2, 1, 0]
    assert none.get_label().endswith("--compress=none")
    assert paper.get_ydata().tolist() == [0.0113, 0.0365, 0.048]
    assert len(small.lines) == 1


PROFILE = [
    {"seconds": seconds, "kernel": kernel, "features": 100, "active_edges_per_second": 1e12}
    for seconds, kernel in ((0.002, "grouped"), (7.2e-6, "resident"), (1.5, "resident"))
]


def test_a_profile_is_in_the_table_and_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = make_report(profile=PROFILE)
    assert "layer 1 alone  2 ms, grouped, 100 features, 1 TE/s active" in result.table()
    assert "layer 3 alone  1.5 s, resident" in result.table()
    figures = []
    monkeypatch.setattr(pytest.importorskip("matplotlib.pyplot"), "close", figures.append)
    report.plot_layers([vars(make_report()), vars(result)], tmp_path / "figure.png")
    (line,) = figures[0].axes[2].lines
    assert line.get_ydata().tolist() == [0.002, 7.2e-6, 1.5]
    assert line.get_label().endswith("grouped/resident")


@pytest.mark.parametrize(("seconds", "text"), [(1.59, "1.59 s"), (0.0113, "11.3 ms"), (7.2e-6, "7.2 us")])
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_plot_of_an_unknown_format_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        report.plot_layers([vars(make_report())], tmp_path / "figure.unknown")
    assert not list(tmp_path.iterdir())


def test_progress_bar_counts_what_is_done(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps report how many are done so far; a bar that added them up would pass 100%."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with report.progress_bar("working", 4) as progress:
        for done in (1, 2, 4):
            progress(done)
        bar = progress.bar  # pyright: ignore[reportFunctionMemberAccess]
        assert (bar.n, bar.total) == (4, 4)
    assert "working" in capsys.readouterr().err


def test_progress_without_a_terminal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with report.progress_bar("working", 4) as progress:
        progress(4)
    captured = capsys.readouterr()
    assert captured.err == "working ...\n"
    assert captured.out == ""


def test_device_and_versions_say_where_it_ran() -> None:
    assert "cores" in report.device() or report.device().startswith("NVIDIA")
    assert set(report.versions()) == {"spdnn_jax", "jax", "jaxlib", "numpy", "python"}
