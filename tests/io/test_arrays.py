"""`read_array`: features, labels and biases in the forms that people keep them in."""

import gzip
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from spdnn_jax.io import arrays, files, read_array
from spdnn_jax.io.arrays import read_vector

ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)


def idx(array: np.ndarray, kind: int) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, kind, array.ndim]) + sizes + array.astype(array.dtype.newbyteorder(">")).tobytes()


def written(write: Any, *arguments: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments, **options)
    return buffer.getvalue()


FORMS = {
    "npy": written(np.save, ARRAY),
    "npz": written(np.savez, ARRAY),
    "SciPy": written(sp.save_npz, sp.csr_array(ARRAY)),
    "Matrix Market": written(scipy.io.mmwrite, sp.coo_array(ARRAY)),
    "tabs": b"0\t1\t2\n3\t4\t5\n",
    "commas": b"0,1,2\n3, 4, 5\n",
    "IDX bytes": idx(ARRAY.astype(np.uint8), 0x08),
    "IDX floats": idx(ARRAY, 0x0D),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_forms(tmp_path: Path, form: str, packed: bool) -> None:
    path = tmp_path / "array"
    path.write_bytes(gzip.compress(FORMS[form]) if packed else FORMS[form])
    found = read_array(path)
    np.testing.assert_array_equal(found, ARRAY)
    assert found.dtype.isnative


def test_idx_in_any_number_of_axes(tmp_path: Path) -> None:
    path = tmp_path / "labels"
    for array in (np.arange(5, dtype=np.uint8), np.arange(24, dtype=np.int32).reshape(2, 3, 4)):
        path.write_bytes(idx(array, 0x08 if array.dtype == np.uint8 else 0x0C))
        found = read_array(path)
        np.testing.assert_array_equal(found, array)
        assert found.dtype == array.dtype


def test_mnist(shared_data: Path) -> None:
    assert read_array(shared_data / "mnist/t10k-labels-idx1-ubyte.gz")[:5].tolist() == [7, 2, 1, 0, 4]
    assert read_array(shared_data / "mnist/t10k-images-idx3-ubyte.gz").shape == (10000, 28, 28)


def test_vectors(tmp_path: Path) -> None:
    path = tmp_path / "v.txt"
    for text in ("1\n2\n3\n", "1 2 3\n", "1,2,3\n"):
        path.write_text(text)
        assert read_vector(path).tolist() == [1, 2, 3]
    path.write_text("1 2\n3 4\n")
    with pytest.raises(ValueError, match=r"v\.txt: expected one row or column of numbers, found shape \(2, 2\)"):
        read_vector(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (FORMS["npy"][:-5], r"cannot be read as a NumPy file .*: write it with numpy\.save"),
        (written(np.save, np.array([object()]), allow_pickle=True), "cannot be read as a NumPy file"),
        (FORMS["npz"][:-30], "cannot be read as a NumPy file"),
        (written(np.savez, a=ARRAY, b=ARRAY), "cannot be read as a sparse matrix of SciPy"),
        (FORMS["IDX bytes"][:-1], r"announces 2 entries, but is cut short or too long \(it holds 1\): fetch it again"),
        (FORMS["IDX bytes"] + b"x", r"too long \(it holds more than 2\)"),
        (b"\0\0\x08", "not an IDX file"),
        (b"\0\0\x01\x01\0\0\0\x01x", "not an IDX file"),
        (b"1 2\nthree 4\n", r"cannot be read as a table of numbers .*three.*: write it with numpy\.savetxt"),
        (b"1 2\n3\n", "cannot be read as a table of numbers"),
        (b"", "it is empty"),
        (b"\xff\xfe\x00", "cannot be read as a table of numbers"),
        (gzip.compress(FORMS["npy"], mtime=0)[:-9], "the gzip stream is corrupt or cut short"),
    ],
)
def test_a_file_that_is_not_what_it_claims(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "array"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_array(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)


@pytest.fixture
def small_contents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bombs are told from so many bytes on: no test has to unpack hundreds of MiB."""
    monkeypatch.setattr(files, "_CONTENT_LARGEST", 1 << 20)
    monkeypatch.setattr(arrays, "_DENSE_LARGEST", 1 << 20)


def test_bombs_are_refused_before_they_are_unpacked(tmp_path: Path, small_contents: None) -> None:
    """Once 4 MB of gzip took 4 GB of disk, and an array's own zip as much memory."""
    zeros = np.zeros(1 << 20, np.uint32)
    np.save(tmp_path / "plain.npy", zeros)
    (tmp_path / "packed").write_bytes(gzip.compress((tmp_path / "plain.npy").read_bytes()))
    np.savez_compressed(tmp_path / "zip", zeros)
    np.testing.assert_array_equal(read_array(tmp_path / "plain.npy"), zeros)
    for name in ("packed", "zip.npz"):
        with pytest.raises(ValueError, match=f"{name}: unpacks to more than 100 times its size"):
            read_array(tmp_path / name)


def test_sizes_that_no_entries_fill_are_refused(tmp_path: Path, small_contents: None) -> None:
    """A matrix of a few bytes that says it has 10^12 numbers."""
    (tmp_path / "m.mtx").write_bytes(b"%%MatrixMarket matrix coordinate real general\n1000000 1000000 1\n1 1 1\n")
    sp.save_npz(tmp_path / "m.npz", sp.coo_array(([1.0], ([0], [0])), shape=(1_000_000, 1_000_000)))
    for name in ("m.mtx", "m.npz"):
        with pytest.raises(ValueError, match=rf"{name}: a sparse matrix of 1,000,000 x 1,000,000 with 1 entries"):
            read_array(tmp_path / name)


def test_arrays_of_no_numbers_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array(["a", "b"]))
    with pytest.raises(ValueError, match=r"x\.npy: cannot be read as a NumPy file \(it holds <U1, no numbers\)"):
        read_array(tmp_path / "x.npy")
