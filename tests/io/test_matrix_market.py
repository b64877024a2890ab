"""Matrix Market files, against SciPy's reader where that reads them."""

import io
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import scipy.sparse as sp

from spdnn_jax.io.matrix_market import read_matrix_market

HEAD = "%%MatrixMarket matrix "


def read(folder: Path, text: str) -> np.ndarray:
    path = folder / "m.mtx"
    path.write_text(text)
    matrix = read_matrix_market(path, "m.mtx")
    return matrix if isinstance(matrix, np.ndarray) else matrix.toarray()


@pytest.mark.parametrize("field", ["real", "integer", "pattern"])
@pytest.mark.parametrize("symmetry", ["general", "symmetric", "skew-symmetric"])
def test_reads_what_scipy_writes(tmp_path: Path, field: str, symmetry: str) -> None:
    matrix = sp.random_array((6, 6), density=0.5, rng=np.random.default_rng(0)) * 10
    matrix = {"general": matrix, "symmetric": matrix + matrix.T, "skew-symmetric": matrix - matrix.T}[symmetry]
    if field != "real":
        matrix = matrix.astype(np.int64)
    buffer = io.BytesIO()
    scipy.io.mmwrite(buffer, matrix, field=field, symmetry=symmetry, comment="a remark")
    expected = scipy.io.mmread(io.BytesIO(buffer.getvalue())).toarray()  # pyright: ignore[reportAttributeAccessIssue]
    np.testing.assert_array_equal(read(tmp_path, buffer.getvalue().decode()), expected)


def test_dense_matrices_stand_column_by_column(tmp_path: Path) -> None:
    found = read(tmp_path, HEAD + "array real general\n% a remark\n\n2 3\n1\n2\n3\n4\n5\n6e0\n")
    np.testing.assert_array_equal(found, [[1, 3, 5], [2, 4, 6]])


def test_no_entries(tmp_path: Path) -> None:
    assert read(tmp_path, HEAD + "coordinate real general\n2 3 0\n").shape == (2, 3)
    assert read(tmp_path, HEAD + "array real general\n0 3\n").shape == (0, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is not"),
        ("%%MatrixMarket vector coordinate real general\n2 1\n1 1\n", "its first line is not"),
        (HEAD + "coordinate complex general\n1 1 1\n1 1 1 0\n", "complex general"),
        (HEAD + "coordinate real hermitian\n1 1 1\n1 1 1\n", "real hermitian"),
        (HEAD + "array real symmetric\n1 1\n1\n", "dense and symmetric"),
        (HEAD + "coordinate real general\n", "3 sizes should follow"),
        (HEAD + "coordinate real general\n2 2\n1 1 1\n", "3 sizes should follow the comments, found '2 2"),
        (HEAD + "coordinate real general\n2 -2 1\n1 1 1\n", "3 sizes should follow"),
        (HEAD + "coordinate real general\n2 2 2\n1 1 1\n", "announces 2 entries and holds 1"),
        (HEAD + "coordinate real general\n2 2 1\n1 1 1\n2 2 2\n", "announces 1 entries and holds 2"),
        (HEAD + "coordinate real general\n2 2 0\n1 1 1\n", "announces 0 entries and holds 1"),
        (HEAD + "coordinate real general\n2 2 1\n3 1 1\n", "entry 1 names row 3 of 2"),
        (HEAD + "coordinate real general\n2 2 2\n1 1 1\n1 0 1\n", "entry 2 names column 0 of 2"),
        (HEAD + "coordinate real general\n2 2 1\n1 1\n", "3 columns but 2 were found"),
        (HEAD + "coordinate real general\n2 2 1\n1.5 1 1\n", "could not convert string '1.5'"),
        (HEAD + "coordinate real general\n3 3 3\n1 1 0.5\n2 3 1.25\n3 1 -2e-3p", "could not convert string '-2e-3p'"),
        (HEAD + "coordinate real general\n1 1 99999999999999999999\n1 1 1\n", "announces 99999999999999999999"),
        (HEAD + "array real general\n9999999999 9999999999\n1\n", "announces 99999999980000000001 entries"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    """SciPy's own reader ends the process on the one with -2e-3p."""
    with pytest.raises(ValueError, match=r"m\.mtx: cannot be read as a Matrix Market file \(.*" + message):
        read(tmp_path, text)
