"""Inputs kept between runs: equal to those made anew, whatever happened to the file."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spdnn_jax.graph_challenge import input_cache, inputs

NEURONS, COUNT = 100, 50  # rows end within a byte


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "spdnn_jax"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """What was made, not read."""
    calls = []
    original = inputs.digits

    def counted(neurons: int, count: int, seed: int = 0, *rest: object) -> np.ndarray:
        calls.append((neurons, count, seed))
        return original(neurons, count, seed, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(inputs, "digits", counted)
    return calls


def test_the_second_time_they_are_read(folder: Path, made: list[tuple[int, int, int]]) -> None:
    first = input_cache.digits(NEURONS, COUNT)
    second = input_cache.digits(NEURONS, COUNT)
    assert len(made) == 1
    assert (second.dtype, second.shape) == (first.dtype, first.shape) == (np.uint8, (COUNT, NEURONS))
    np.testing.assert_array_equal(first, inputs.digits(NEURONS, COUNT))
    np.testing.assert_array_equal(second, first)
    np.testing.assert_array_equal(input_cache.digits(NEURONS, COUNT, share=slice(1, None, 3)), first[1::3])
    assert [path.suffix for path in folder.iterdir()] == [".bits"], "nothing half-written is left"


def test_other_inputs_are_not_taken_for_these(folder: Path, made: list[tuple[int, int, int]]) -> None:
    wanted = [(NEURONS, COUNT, 0), (NEURONS, COUNT, 1), (NEURONS, COUNT + 1, 0), (NEURONS + 21, COUNT, 0)]
    for one in wanted:
        input_cache.digits(*one)
    assert made == wanted
    assert len(list(folder.iterdir())) == 4


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-1] + bytes([content[-1] ^ 16]),
        lambda content: bytes([content[0] ^ 1]) + content[1:],
        lambda content: b"",
    ],
)
def test_a_damaged_file_is_made_anew(
    folder: Path, made: list[tuple[int, int, int]], damage: Callable[[bytes], bytes]
) -> None:
    first = input_cache.digits(NEURONS, COUNT)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    np.testing.assert_array_equal(input_cache.digits(NEURONS, COUNT), first)
    assert len(made) == 2
    assert path.read_bytes() == whole


def test_a_file_of_other_inputs_under_this_name_is_not_used(folder: Path, made: list[tuple[int, int, int]]) -> None:
    first = input_cache.digits(NEURONS, COUNT)
    (path,) = folder.iterdir()
    input_cache.digits(NEURONS, COUNT, 1)
    (other,) = set(folder.iterdir()) - {path}
    path.write_bytes(other.read_bytes())
    np.testing.assert_array_equal(input_cache.digits(NEURONS, COUNT), first)
    assert len(made) == 3


def test_where_nothing_can_be_written_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file stands where the folder would be: no permission that root would not have."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert input_cache.digits(NEURONS, COUNT).shape == (COUNT, NEURONS)
    assert (tmp_path / "file").read_text() == ""


def test_a_share_alone_is_not_kept(folder: Path) -> None:
    assert input_cache.digits(NEURONS, COUNT, share=slice(0, None, 2)).shape == (COUNT // 2, NEURONS)
    assert not folder.exists()


def test_bits_of_older_code_are_not_used(
    folder: Path, made: list[tuple[int, int, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    input_cache.digits(NEURONS, COUNT)
    changed = tmp_path / "inputs.py"
    changed.write_text("# otherwise\n")
    monkeypatch.setattr(inputs, "__file__", str(changed))
    input_cache.digits(NEURONS, COUNT)
    assert len(made) == len(list(folder.iterdir())) == 2
