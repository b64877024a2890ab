"""The official TSV files: reading, and what is said of files that are wrong."""

import gzip
import io
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spdnn_jax import Clip
from spdnn_jax._native import core
from spdnn_jax.graph_challenge import official_files, radixnet
from spdnn_jax.io import tables
from spdnn_jax.network import NetworkFile

NEURONS = 64


def layer_lines(number: int = 1) -> list[str]:
    layer = list(radixnet.layers(NEURONS, number))[-1]
    outputs = np.repeat(np.arange(NEURONS), np.diff(layer.indptr))
    return [f"{i + 1}\t{j + 1}\t0.0625\n" for i, j in zip(layer.indices, outputs, strict=True)]


def write_network(folder: Path, layers: int = 3) -> Path:
    network = folder / f"neuron{NEURONS}"
    network.mkdir()
    for number in range(1, layers + 1):
        (network / f"n{NEURONS}-l{number}.tsv").write_text("".join(layer_lines(number)))
    return network


def write_archive(folder: Path, names: list[str]) -> Path:
    path = folder / f"neuron{NEURONS}.tar.gz"
    content = "".join(layer_lines()).encode()
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("packed", [False, True])
def test_reads_a_network(tmp_path: Path, packed: bool) -> None:
    network = write_network(tmp_path)
    if packed:
        with tarfile.open(tmp_path / f"neuron{NEURONS}.tar.gz", "w:gz") as archive:
            archive.add(network, arcname=network.name)
        for file in network.iterdir():
            file.unlink()
    for read, expected in zip(official_files.layers(tmp_path, NEURONS, 3), radixnet.layers(NEURONS, 3), strict=True):
        read.validate()
        np.testing.assert_array_equal(read.indices, expected.indices)
        np.testing.assert_array_equal(read.indptr, expected.indptr)
        assert read.values.shape == ()


def test_order_of_lines_does_not_matter_and_weights_may_differ(tmp_path: Path) -> None:
    lines = layer_lines()
    lines[5] = lines[5].replace("0.0625", "-2.5")
    shuffled = np.random.default_rng(0).permutation(lines)
    path = tmp_path / "layer.tsv"
    path.write_text("".join(shuffled))
    layer = official_files.read_layer(path, NEURONS)
    layer.validate()
    assert layer.values[5] == -2.5
    np.testing.assert_array_equal(layer.indices, next(radixnet.layers(NEURONS, 1)).indices)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: [], r"the file is empty"),
        (lambda lines: lines[:-1], rf"line {NEURONS * 32 - 1}: output neuron {NEURONS} has 31 edges"),
        (lambda lines: [*lines[:-1], lines[-1][:-2]], rf"line {NEURONS * 32}: the line has no end: .*cut short"),
        (lambda lines: [*lines[:4], "\n", *lines[4:]], r"line 5: expected two whole numbers"),
        (lambda lines: ["1_0\t1\t0.0625\n", *lines[1:]], r"line 1: expected two whole numbers"),
        (lambda lines: [*lines[:-1], "64\t6"], rf"line {NEURONS * 32}: expected two whole numbers"),
        (lambda lines: [*lines[:9], "cat\t1\t0.0625\n", *lines[10:]], r"line 10: expected .*found 'cat"),
        (lambda lines: [*lines[:9], "1\t1\t\n", *lines[10:]], r"line 10: expected two whole numbers"),
        (lambda lines: [*lines[:9], "0\t1\t0.0625\n", *lines[10:]], r"line 10: neuron 0 .*count from 1"),
        (lambda lines: [*lines[:9], "65\t1\t0.0625\n", *lines[10:]], r"line 10: neuron 65 .*network of 64 neurons"),
        (lambda lines: [*lines[:9], "-4\t1\t0.0625\n", *lines[10:]], r"line 10: neuron -4"),
        (lambda lines: [*lines[:9], "99999999999\t1\t1\n", *lines[10:]], r"line 10: expected two whole numbers"),
        (lambda lines: [*lines[:9], "1\t1\t1e60\n", *lines[10:]], r"line 10: the weight inf is not a finite number"),
        (lambda lines: [*lines[:9], "1\t1\tnan\n", *lines[10:]], r"line 10: the weight nan is not a finite number"),
        (lambda lines: [*lines[:9], lines[8], *lines[10:]], r"line 10: the edge stands in the file twice"),
    ],
)
def test_a_malformed_layer_is_named(tmp_path: Path, change: object, message: str) -> None:
    path = tmp_path / "n64-l1.tsv"
    path.write_text("".join(change(layer_lines())))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=message) as caught:
        official_files.read_layer(path, NEURONS)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("block", [1000, 1 << 20])
@pytest.mark.parametrize(
    "harmless",
    [
        lambda text: b"\xef\xbb\xbf" + text,
        lambda text: text + b"\n",
        lambda text: text + b"\r\n \n\t\n" * 50,
        lambda text: text + b"   ",
        lambda text: text.replace(b"\n", b"\t\n"),
        lambda text: text.replace(b"\n", b"\r\n"),
    ],
)
def test_what_programs_add_to_a_table_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harmless: Callable[[bytes], bytes], block: int, suffix: str
) -> None:
    monkeypatch.setattr(tables, "_BLOCK", block)
    text = harmless("".join(layer_lines()).encode())
    path = tmp_path / "layer.tsv"  # packed or not: told by its bytes
    path.write_bytes(gzip.compress(text, 1) if suffix else text)
    layer = official_files.read_layer(path, NEURONS)
    np.testing.assert_array_equal(layer.indices, next(radixnet.layers(NEURONS, 1)).indices)


@pytest.mark.parametrize(
    ("line", "shown", "is_corrupt"),
    [("\t1\t1\t1", r"'\t1\t1\t1'", False), ("1 1 1 ", "'1 1 1 '", False), ("1\t1\t\x001", r"'1\t1\t\x001'", True)],
)
def test_a_malformed_line_is_shown_as_it_is(tmp_path: Path, line: str, shown: str, is_corrupt: bool) -> None:
    """Blanks at its ends may be what is wrong; to fetch the file again mends damage, not another form."""
    path = tmp_path / "layer.tsv"
    path.write_text("".join([*layer_lines()[:2], line + "\n", *layer_lines()[3:]]))
    with pytest.raises(ValueError, match="line 3: expected two whole numbers") as caught:
        official_files.read_layer(path, NEURONS)
    assert f"found {shown}" in str(caught.value)
    assert ("fetch the file again" in str(caught.value)) == is_corrupt


def test_blank_lines_between_rows_are_no_form(tmp_path: Path) -> None:
    path = tmp_path / "layer.tsv"
    path.write_text("".join([*layer_lines()[:4], "\n" * 100, *layer_lines()[4:]]))
    with pytest.raises(ValueError, match=r"line 5: expected .*found ''"):
        official_files.read_layer(path, NEURONS)


def test_a_layer_of_too_many_edges_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.tsv"
    path.write_text("".join([*layer_lines(), *layer_lines()]))
    with pytest.raises(ValueError, match="more than the 2,048 edges"):
        official_files.read_layer(path, NEURONS)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_agree_on_rows_and_on_the_malformed_line(threads: int) -> None:
    """A file of several parts must neither lose rows at their borders nor count the lines of one part only."""
    lines = [b"%d\t%d\t%g\n" % (k, k * 7 % 1000, k % 3 * 0.5) for k in range(300_000)]
    text = b"".join(lines)
    *columns, used = core.parse_table(np.frombuffer(text, np.uint8), threads)
    assert used == len(text) > 3 << 20
    rows = np.arange(300_000)
    for column, expected in zip(columns, (rows, rows * 7 % 1000, rows % 3 * 0.5), strict=True):
        np.testing.assert_array_equal(column, expected)
    for wrong in (100, 150_000, 299_999):
        damaged = b"".join([*lines[:wrong], b"1\t1\n", *lines[wrong + 1 :]])
        *columns, used = core.parse_table(np.frombuffer(damaged, np.uint8), threads)
        assert (columns[0].size, columns[2].size, used) == (wrong, wrong, sum(map(len, lines[:wrong])))


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (b"2147483647\t-2147483648\t1\n", (2**31 - 1, -(2**31), 1)),
        (b"0000000000012\t012\t6.25e-02\n", (12, 12, 0.0625)),
        (b" 1 \t 2 \t +.5 \r\n", (1, 2, 0.5)),
        (b"1\t2\t-5.E3\r\n", (1, 2, -5000)),
        (b"1\t2\t1e-60\n", (1, 2, 0)),
        (b"1\t2\t-1e60\n", (1, 2, -np.inf)),
        (b"1\t2\tInf\n", (1, 2, np.inf)),
        (b"2147483648\t1\t1\n", None),
        (b"1\t-2147483649\t1\n", None),
        (b"1\t99999999999999999999999\t1\n", None),
        (b"+1\t1\t1\n", None),
        (b"1.0\t1\t1\n", None),
        (b"1\t\t1\n", None),
        (b"\t1\t1\n", None),
        (b"1\t1\t\n", None),
        (b"1\t1\n", None),
        (b"1\t1\t1\t\n", (1, 1, 1)),
        (b"1\t1\t1 \t \r\n", (1, 1, 1)),
        (b"1\t1\t1\t\t\n", None),
        (b"1\t1\t1\t1\n", None),
        (b"1 1 1\n", None),
        (b"1\t1\t+-1\n", None),
        (b"1\t1\t1x\n", None),
        (b"1\t1\t0x1\n", None),
        (b"1\t1\t1\0\n", None),
        (b"1\t1\t1\r\r\n", None),
        (b"1\t1\t\xff\n", None),
        (b"\n", None),
    ],
)
def test_the_form_of_a_line(line: bytes, row: tuple[float, ...] | None) -> None:
    """Also behind lines like it, where what the reader remembers of them must not hide a difference."""
    for before in (b"", b"5\t1\t1\n", b"5\t2\t6.25e-02\n", b"5\t2\t1\n5\t2\t1\n"):
        text = before + line
        *columns, used = core.parse_table(np.frombuffer(text, np.uint8), 1)
        rows = before.count(b"\n")
        assert (columns[0].size, used) == ((rows, len(before)) if row is None else (rows + 1, len(text)))
        if row is not None:
            assert tuple(column[-1] for column in columns) == row


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 200), st.sampled_from(["1", "0.5", "1e-3", "25"]))),
    cut=st.integers(0, 30),
)
def test_rows_equal_what_python_reads(rows: list[tuple[int, int, str]], cut: int) -> None:
    """Repeated ends of lines are not read again: no row may keep the end of one that only looks alike."""
    text = "".join(f"{a}\t{b}\t{c}\n" for a, b, c in rows).encode()
    text = text[: max(len(text) - cut, 0)]
    *columns, used = core.parse_table(np.frombuffer(text, np.uint8), 2)
    expected = [line.split("\t") for line in text.decode().split("\n")[:-1]]
    assert used == text.rfind(b"\n") + 1
    assert columns[0].tolist() == [int(fields[0]) for fields in expected]
    assert columns[1].tolist() == [int(fields[1]) for fields in expected]
    np.testing.assert_array_equal(columns[2], np.asarray([fields[2] for fields in expected], np.float32))


@pytest.mark.parametrize("block", [13, 16, 64, 1000])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_blocks_may_end_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, suffix: str) -> None:
    """A line that two blocks share must be read once and whole, and counted."""
    monkeypatch.setattr(tables, "_BLOCK", block)
    path = tmp_path / f"sparse-images-64.tsv{suffix}"
    lines = [b"%d\t%d\t1\n" % (k + 1, k % 64 + 1) for k in range(200)]

    def write(lines: list[bytes]) -> None:
        path.write_bytes(gzip.compress(b"".join(lines)) if suffix else b"".join(lines))

    write(lines)
    features = official_files.features(tmp_path, NEURONS, 200)
    np.testing.assert_array_equal(np.argmax(features, axis=1), np.arange(200) % 64)
    assert features.sum() == 200
    write([*lines[:150], b"1\t65\t1\n", *lines[151:]])
    with pytest.raises(ValueError, match="line 151: pixel 65"):
        official_files.features(tmp_path, NEURONS, 200)
    write([*lines[:150], b"one\t5\t1\n", *lines[151:]])
    with pytest.raises(ValueError, match=r"line 151: expected .* found 'one"):
        official_files.features(tmp_path, NEURONS, 200)
    write([*lines[:-1], b"200\t8"])
    with pytest.raises(ValueError, match="line 200: expected"):
        official_files.features(tmp_path, NEURONS, 200)
    write([*lines[:150], b"1" * 2000 + b"\n"])
    with pytest.raises(ValueError, match="line 151: expected"):
        official_files.features(tmp_path, NEURONS, 200)


def test_a_layer_of_another_network_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "layer.tsv"
    path.write_text("".join(layer_lines()))
    with pytest.raises(ValueError, match="of 128 neurons"):
        official_files.read_layer(path, 128)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"neither neuron64/n64-l1\.tsv nor neuron64\.tar\.gz"):
        list(official_files.layers(tmp_path, NEURONS, 1))
    write_network(tmp_path, layers=2)
    with pytest.raises(FileNotFoundError, match=r"n64-l3\.tsv is missing"):
        list(official_files.layers(tmp_path, NEURONS, 3))
    with pytest.raises(FileNotFoundError, match=r"sparse-images-64\.tsv"):
        official_files.features(tmp_path, NEURONS, 10)


@pytest.mark.parametrize("name", ["../n64-l1.tsv", "/tmp/n64-l1.tsv", "neuron64/../../n64-l1.tsv"])
def test_an_archive_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l1.tsv", name])
    with pytest.raises(ValueError, match="points outside its folder"):
        list(official_files.layers(tmp_path, NEURONS, 1))


def test_messages_name_the_archive_and_not_its_temporary_folder(tmp_path: Path) -> None:
    path = write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l1.tsv"])
    with pytest.raises(FileNotFoundError) as missing:
        list(official_files.layers(tmp_path, NEURONS, 2))
    assert str(missing.value).startswith(f"{path}: neuron64/n64-l2.tsv is missing")
    wrong = b"cat\t1\t1\n"
    with tarfile.open(path, "w:gz") as archive:
        member = tarfile.TarInfo(f"neuron{NEURONS}/n{NEURONS}-l1.tsv")
        member.size = len(wrong)
        archive.addfile(member, io.BytesIO(wrong))
    with pytest.raises(ValueError, match="line 1: expected") as malformed:
        list(official_files.layers(tmp_path, NEURONS, 1))
    assert str(malformed.value).startswith(f"{path}: neuron64/n64-l1.tsv, line 1")


def test_a_plain_archive_is_told_by_its_bytes(tmp_path: Path) -> None:
    """A browser may unpack what it fetches and keep the name."""
    path = write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l1.tsv"])
    path.write_bytes(gzip.decompress(path.read_bytes()))
    assert len(list(official_files.layers(tmp_path, NEURONS, 1))) == 1


def archive_with(folder: Path, change: Callable[[tarfile.TarInfo], None], content: bytes = b"", **options: Any) -> Path:
    path = folder / f"neuron{NEURONS}.tar.gz"
    with tarfile.open(path, "w:gz", **options) as archive:
        member = tarfile.TarInfo(f"neuron{NEURONS}/n{NEURONS}-l1.tsv")
        member.size = len(content)
        change(member)
        archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("mtime", [2**62, -(2**62), 1e300])
def test_the_time_of_a_member_does_not_matter(tmp_path: Path, mtime: float) -> None:
    content = "".join(layer_lines()).encode()
    archive_with(
        tmp_path,
        lambda member: setattr(member, "pax_headers", {"mtime": str(mtime)}),
        content,
        format=tarfile.PAX_FORMAT,
    )
    assert len(list(official_files.layers(tmp_path, NEURONS, 1))) == 1


def test_a_member_larger_than_any_layer_is_refused(tmp_path: Path) -> None:
    """A few kB of gzip unpack to as many MB, which must not fill the disk."""
    archive_with(tmp_path, lambda member: None, bytes(64 * 32 * NEURONS + 1))
    with pytest.raises(ValueError, match="more than such a layer can have"):
        list(official_files.layers(tmp_path, NEURONS, 1))


def test_a_header_that_would_fill_memory_is_refused(tmp_path: Path) -> None:
    archive_with(
        tmp_path, lambda member: setattr(member, "pax_headers", {"comment": "x" * (2 << 20)}), format=tarfile.PAX_FORMAT
    )
    with pytest.raises(ValueError, match="a header of more than a MiB"):
        list(official_files.layers(tmp_path, NEURONS, 1))


@pytest.mark.parametrize("packed", [True, False])
def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l{k}.tsv" for k in (1, 2)])
    for _ in official_files.layers(tmp_path, NEURONS, 2):
        assert not list(folder.iterdir())


def test_a_link_in_an_archive_is_no_layer(tmp_path: Path) -> None:
    """Extracting a hard link to a member that is not there raises KeyError."""
    with tarfile.open(tmp_path / f"neuron{NEURONS}.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo(f"neuron{NEURONS}/n{NEURONS}-l1.tsv")
        member.type, member.linkname = tarfile.LNKTYPE, "neuron64/absent"
        archive.addfile(member)
    with pytest.raises(FileNotFoundError, match=r"n64-l1\.tsv is missing"):
        list(official_files.layers(tmp_path, NEURONS, 1))


@pytest.mark.parametrize("damage", ["cut", "noise", "bits"])
def test_a_corrupt_archive_is_named(tmp_path: Path, damage: str) -> None:
    path = write_archive(tmp_path, [f"neuron{NEURONS}/n{NEURONS}-l{k}.tsv" for k in (1, 2)])
    content = bytearray(path.read_bytes())
    if damage == "bits":
        content[len(content) // 2] ^= 0xFF
    path.write_bytes({"cut": content[: len(content) // 2], "noise": b"no gzip at all", "bits": content}[damage])
    with pytest.raises(ValueError, match=r"neuron64\.tar\.gz: the archive is corrupt or cut short"):
        list(official_files.layers(tmp_path, NEURONS, 2))


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_reads_inputs(tmp_path: Path, suffix: str) -> None:
    text = b"1\t3\t1\n1\t64\t1\n3\t1\t1\n4\t9\t1\n"
    (tmp_path / f"sparse-images-64.tsv{suffix}").write_bytes(gzip.compress(text) if suffix else text)
    features = official_files.features(tmp_path, NEURONS, 3)
    expected = np.zeros((3, NEURONS), np.uint8)
    expected[[0, 0, 2], [2, 63, 0]] = 1
    np.testing.assert_array_equal(features, expected)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"1\t0\t1\n", "line 1: pixel 0"),
        (b"1\t1\t1\n1\t65\t1\n", "line 2: pixel 65"),
        (b"1\t1\t1\n2\t1\t0.5\n", "line 2: a pixel is 0 or 1, found 0.5"),
        (b"1\t1\tnan\n2\t1\t1\n", "line 1: a pixel is 0 or 1, found nan"),
        (b"1\t1\t1\n1\t2\t1\n", "line 2: the last feature is 1, 2 were asked for"),
        (b"1\t1\t1\n2\t2\t1", "line 2: the line has no end"),
        (b"1\t1\t1\nx\t65\t1\n", "line 2: expected"),
        (b"", "the file is empty"),
    ],
)
def test_malformed_inputs_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sparse-images-64.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        official_files.features(tmp_path, NEURONS, 2)


def test_corrupt_packed_inputs_are_named(tmp_path: Path) -> None:
    packed = gzip.compress(b"".join(b"%d\t1\t1\n" % k for k in range(1, 5000)))
    (tmp_path / "sparse-images-64.tsv.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(ValueError, match="corrupt or cut short"):
        official_files.features(tmp_path, NEURONS, 2)


def test_convert_writes_what_layers_reads(tmp_path: Path) -> None:
    write_network(tmp_path)
    done = []
    official_files.convert(tmp_path, NEURONS, 3, tmp_path / "network.safetensors", done.append)
    assert done == [1, 2, 3]
    converted = NetworkFile(tmp_path / "network.safetensors")
    assert converted.activation == (Clip.relu(32),) * 3
    for ours, theirs in zip(converted, official_files.layers(tmp_path, NEURONS, 3), strict=True):
        np.testing.assert_array_equal(ours.indices, theirs.indices)
        assert ours.values == theirs.values
        assert ours.bias == theirs.bias
