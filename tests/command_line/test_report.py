"""The report of a run: its figures, the table, JSON."""

from pathlib import Path
from typing import Any

import pytest

from spdnn_jax.command_line import report
from tests.command_line.example import PROFILE, make_report


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
    assert rows["seconds"] == "read 0.25, compile 0.5"
    assert rows["inference"] == "2 s, median of 3: device-resident input to categories"
    assert rows["nominal"] == "3e-06 GE/s: features x edges of the original network / seconds"
    assert rows["active"] == "5.375e-07 GE/s: edges truly multiplied / seconds"
    assert rows["active features"] == "layer 1: 50; 3: 0"
    assert rows["check"] == "as it should be"
    assert "truth" not in rows


@pytest.mark.parametrize(
    ("layers", "shown"),
    [
        (1, [1]),
        (3, [1, 3]),
        (25, [1, 3, 10, 25]),
        (30, [1, 3, 10, 30]),
        (1920, [1, 3, 10, 30, 100, 300, 1000, 1920]),
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


@pytest.mark.parametrize(
    "change",
    [{"active": 3}, {"active": [1, None, 3]}, {"seconds": {}}, {"compress": "zip"}, {"layers": "3"}, {"active": [1]},
     {"profile": [{"seconds": 1}]}, {"seconds": {"inference": "1"}}, {"device": None}],
)  # fmt: skip
def test_fields_of_another_type_are_named(tmp_path: Path, change: dict[str, Any]) -> None:
    """They ended in a traceback where a figure was drawn."""
    path = tmp_path / "other.json"
    report.write_json(path, vars(make_report()) | change)
    with pytest.raises(
        ValueError, match=rf"{path}: holds no report of a run, (layers|{next(iter(change))}) is missing"
    ):
        report.read_reports([path])


def test_json_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.json"
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="not a JSON report"):
        report.read_reports([path])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(TypeError):
        report.write_json(path, {"a": object()})
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]


def test_a_write_that_fails_at_the_end_leaves_nothing(tmp_path: Path) -> None:
    """A folder of the target's name lets the content be written beside it, and refuses the last step."""
    target = tmp_path / "report.json"
    target.mkdir()
    with pytest.raises(OSError, match=target.name):
        make_report().write(target)
    assert list(tmp_path.iterdir()) == [target]


def test_a_profile_is_in_the_table() -> None:
    table = make_report(profile=PROFILE).table()
    assert "layer 1 alone    2 ms, grouped, 100 features, 1 TE/s active" in table
    assert "layer 3 alone    1.5 s, resident" in table


@pytest.mark.parametrize(("seconds", "text"), [(1.59, "1.59 s"), (0.0113, "11.3 ms"), (7.2e-6, "7.2 us")])
def test_duration(seconds: float, text: str) -> None:
    assert report.duration(seconds) == text


def test_device_and_versions_say_where_it_ran() -> None:
    assert "cores" in report.device() or report.device().startswith("NVIDIA")
    assert set(report.versions()) == {"spdnn_jax", "jax", "jaxlib", "numpy", "python"}


def test_the_table_fits_a_screen() -> None:
    """Thirteen lines of active features, and one for each stage, pushed what matters off it."""
    edges = [32] * 1920
    result = make_report(
        layers=1920, active=edges, layer_edges=edges, multiplied_edges=edges, check="agrees", truth="too"
    )
    table = result.table()
    assert len(table.splitlines()) < 20
