"""The challenge's measures and truth files."""

from pathlib import Path

import numpy as np
import pytest

from spdnn_jax.graph_challenge import networks


def test_edges() -> None:
    layer_edges = np.array([10, 20, 30])
    assert networks.nominal_edges(60000, layer_edges) == 60000 * 60
    assert networks.active_edges(100, layer_edges, np.array([50, 5, 1])) == 100 * 10 + 50 * 20 + 5 * 30


def test_edges_do_not_overflow() -> None:
    """The largest network has 60,000 x 4 G nominal edges."""
    layer_edges = np.full(1920, 65536 * 32, np.int64)
    assert networks.nominal_edges(60000, layer_edges) == 60000 * 1920 * 65536 * 32


def test_categories_survive_a_file(tmp_path: Path) -> None:
    alive = np.zeros(100, bool)
    alive[[0, 41, 99]] = True
    path = tmp_path / "categories.tsv"
    networks.write_categories(path, networks.category_ids(alive))
    assert path.read_text() == "1\n42\n100\n"
    np.testing.assert_array_equal(networks.read_categories(path), [1, 42, 100])


def test_reads_the_official_truth(shared_data: Path) -> None:
    ids = networks.read_categories(shared_data / "graph-challenge" / "neuron1024-l120-categories.tsv")
    assert len(ids) == 1812
    assert ids[:3].tolist() == [287, 295, 386]


@pytest.mark.parametrize("line", ["0", "-3", "1.5", "cat", "", "9" * 30, "7", "3"])
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "categories.tsv"
    path.write_text(f"7\n{line}\n9\n")
    with pytest.raises(ValueError, match=r"categories\.tsv, line 2"):
        networks.read_categories(path)


def test_a_cut_truth_file_is_refused(tmp_path: Path) -> None:
    """59898 cut to 5989 would still read as a category."""
    path = tmp_path / "categories.tsv"
    path.write_text("287\n598\n5989")
    with pytest.raises(ValueError, match=r"categories\.tsv, line 3: the line has no end"):
        networks.read_categories(path)
