"""Figures drawn from reports."""

from pathlib import Path

import pytest

from spdnn_jax.command_line import plots
from tests.command_line.example import PROFILE, make_report


def test_plot_draws_active_features_and_multiplied_edges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    pyplot = pytest.importorskip("matplotlib.pyplot")
    monkeypatch.setattr(pyplot, "close", figures.append)
    plots.plot_layers([vars(make_report())], tmp_path / "figure.png")
    features, edges = (axis.lines[0] for axis in figures[0].axes)
    assert features.get_ydata().tolist() == [50, 5, 0]
    assert edges.get_ydata().tolist() == [100 * 5, 50 * 10, 5 * 15]
    assert figures[0].get_suptitle() == "Layer by layer: a processor, 2 cores"
    texts = [*figures[0].findobj(pytest.importorskip("matplotlib.text").Text)]
    assert not [text.get_text() for text in texts if "10^" in text.get_text() or "--" in text.get_text()]
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
    plots.plot_networks(runs, tmp_path / "figure.png")
    plots.plot_networks([vars(make_report())], tmp_path / "small.png")
    axis, small = (figure.axes[0] for figure in figures)
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1024x120", "1024x480", "4096x120"]
    none, full, paper = axis.lines
    assert none.get_xdata().tolist() == full.get_xdata().tolist() == [2, 1, 0]
    assert none.get_label().endswith("2 cores, not compressed")
    assert axis.get_title() == "on different machines: a processor, 2 cores; one NVIDIA H100"
    assert small.get_title() == "", "one machine"
    assert paper.get_ydata().tolist() == [0.0113, 0.0365, 0.048]
    assert len(small.lines) == 1


def test_plot_of_an_unknown_format_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not supported"):
        plots.plot_layers([vars(make_report())], tmp_path / "figure.unknown")
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_at_the_end_leaves_nothing(tmp_path: Path) -> None:
    """A folder of the target's name lets the content be written beside it, and refuses the last step."""
    target = tmp_path / "figure.png"
    target.mkdir()
    with pytest.raises(OSError, match=target.name):
        plots.plot_layers([vars(make_report())], target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_profile_is_in_the_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    monkeypatch.setattr(pytest.importorskip("matplotlib.pyplot"), "close", figures.append)
    plots.plot_layers([vars(make_report()), vars(make_report(profile=PROFILE))], tmp_path / "figure.png")
    (line,) = figures[0].axes[2].lines
    assert line.get_ydata().tolist() == [0.002, 7.2e-6, 1.5]
    assert line.get_label().endswith("grouped/resident")
