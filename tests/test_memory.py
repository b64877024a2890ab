"""What readers take of memory: at most four times what a file says it holds, and what a few blocks of it need.

Measured on whole files of some MiB; `test_fuzz.py` bounds what damaged ones take. Reports are left out: the standard
library reads JSON, and takes what it likes.
"""

import ctypes
import gc
import gzip
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse as sp

from spdnn_jax import Clip, Plan, SparseLayer, SparseNetwork, build_plan
from spdnn_jax.graph_challenge import networks, official_files, radixnet
from spdnn_jax.graph_challenge.inputs import read_idx_images
from spdnn_jax.io import read_array, read_network
from tests.conftest import official_archive

PR_SET_THP_DISABLE = 41  # of Linux
NEURONS = 1024
SIZE = 4 << 20  # bytes that a file says it holds, about
BLOCKS = 10 << 20  # bytes beside: allocators, a block of unpacked bytes, the tables of small things


@dataclass(frozen=True)
class Form:
    """A form of file.

    Attributes:
        name: The file's, which may say what it is.
        content: Makes one of some MiB.
        read: Reads the file at a path.
        says: Bytes that it says it holds, where that is not the file's size, unpacked.
    """

    name: str
    content: Callable[[], bytes]
    read: Callable[[Path], Any]
    says: int | None = None


def written(write: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[], bytes]:
    def content() -> bytes:
        buffer = io.BytesIO()
        write(buffer, *(make() if callable(make) else make for make in arguments), **options)
        return buffer.getvalue()

    return content


def matrix(density: float = 0.5) -> sp.csr_array:
    dense = np.random.default_rng(0).random((NEURONS, NEURONS), np.float32)
    return sp.csr_array(np.where(dense < density, dense, 0))


def network() -> SparseNetwork:
    return SparseNetwork([SparseLayer.from_scipy(matrix(), -0.1)])


def saved(make: Callable[[], SparseNetwork | Plan]) -> bytes:
    with tempfile.NamedTemporaryFile() as file:
        make().save(file.name)
        return Path(file.name).read_bytes()


def table(rows: np.ndarray, columns: np.ndarray, value: str) -> bytes:
    return "".join(f"{row}\t{column}\t{value}\n" for row, column in zip(rows, columns, strict=True)).encode()


def official(neurons: int) -> bytes:
    (layer,) = radixnet.layers(neurons, 1)
    outputs = np.repeat(np.arange(neurons), np.diff(layer.indptr))
    return table(np.asarray(layer.indices) + 1, outputs + 1, "0.0625")


def edges(generator: np.random.Generator | None = None) -> bytes:
    """A table of edges: of a row after the other, or in any order."""
    row, column = matrix().tocoo().coords
    order = np.arange(row.size) if generator is None else generator.permutation(row.size)
    return table(row[order] + 1, column[order] + 1, "1")


def state_dict() -> bytes:
    rows = matrix()
    parts = {"crow_indices": rows.indptr.astype(np.int64), "col_indices": rows.indices.astype(np.int64)}
    return safetensors.numpy.save({f"0.weight.{name}": part for name, part in {**parts, "values": rows.data}.items()})


def of_network(path: Path) -> SparseNetwork:
    return read_network(path, activation=Clip.relu())


def drained(items: Iterable[Any]) -> None:
    for _ in items:
        pass


WIDE = 8192
EDGES = NEURONS * NEURONS // 2  # about
OF_TABLE = 12 * EDGES  # two indices and a weight
IDX = bytes([0, 0, 8, 3]) + b"".join(size.to_bytes(4, "big") for size in (6000, 28, 28)) + bytes(6000 * 28 * 28)
IDX_FLOATS = bytes([0, 0, 0x0D, 1]) + (1 << 20).to_bytes(4, "big") + bytes(4 << 20)
PIXELS = np.arange(400_000)
FORMS = {
    "layer": Form("l.tsv", lambda: official(WIDE), lambda path: official_files.read_layer(path, WIDE)),
    "archive": Form(
        f"neuron{WIDE}.tar.gz",
        lambda: official_archive(WIDE, official(WIDE)),
        lambda path: drained(official_files.layers(path, WIDE, 2)),
    ),
    "inputs": Form(
        "sparse-images-1024.tsv",
        lambda: table(1 + PIXELS // 50, 1 + PIXELS % 1024, "1"),
        lambda path: official_files.features(path.parent, 1024, 8000),
        says=8000 * 1024,
    ),
    "idx": Form("images", lambda: IDX, read_idx_images),
    "idx of floats": Form("x.idx", lambda: IDX_FLOATS, read_array),
    "network": Form("network.safetensors", lambda: saved(network), of_network),
    "plan": Form(
        "plan", lambda: saved(lambda: build_plan(network())), lambda path: Plan.load(path, precision=None).words
    ),
    "mapped plan": Form(
        "plan", lambda: saved(lambda: build_plan(network())), lambda path: Plan.open(path).cut(0, 1).words
    ),
    "state dict": Form("s.safetensors", state_dict, of_network),
    "dense state dict": Form(
        "d.safetensors", lambda: safetensors.numpy.save({"0.weight": matrix(density=0.25).toarray()}), of_network
    ),
    "scipy": Form("m.npz", written(sp.save_npz, matrix, compressed=False), of_network),
    "scipy packed": Form("m.npz", written(sp.save_npz, matrix), of_network, says=8 * EDGES),
    "matrix market": Form("m.mtx", written(scipy.io.mmwrite, matrix), of_network),
    "edges": Form("edges", edges, of_network, says=OF_TABLE),
    "edges in any order": Form("edges", lambda: edges(np.random.default_rng(0)), of_network, says=OF_TABLE),
    "npy": Form("x.npy", written(np.save, lambda: np.ones(SIZE // 8)), read_array),
    "npz": Form("x.npz", written(np.savez_compressed, lambda: np.arange(SIZE // 8)), read_array, says=SIZE),
    "sparse array": Form("x.npz", written(sp.save_npz, matrix), read_array, says=8 * EDGES),
    "sparse market": Form("x.mtx", written(scipy.io.mmwrite, matrix), read_array),
    "dense market": Form("x.mtx", written(scipy.io.mmwrite, lambda: matrix().toarray()), read_array, says=8 << 20),
    "text": Form("x.txt", lambda: b"1,2,3\n" * 400_000, read_array, says=8 * 1_200_000),
    "categories": Form(
        "c.tsv",
        lambda: "".join(f"{category}\n" for category in range(1, 400_000)).encode(),
        networks.read_categories,
        says=8 * 400_000,
    ),
}
PACKED = ("layer", "inputs", "idx", "network", "state dict", "scipy", "matrix market", "edges", "npy", "text")
CASES = [*((name, False) for name in FORMS), *((name, True) for name in PACKED)]


@pytest.fixture(scope="module", autouse=True)
def _small_pages() -> Iterator[None]:
    """Memory comes in pages of 4 KiB: huge ones, which come as the system likes, would count what nobody touched."""
    libc = ctypes.CDLL(None)
    libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    yield
    libc.prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0)


@pytest.fixture(scope="module", autouse=True)
def _frozen() -> None:
    """What the tests before left, programs above all, would be gone through at each of `peak`'s collections."""
    gc.collect()
    gc.freeze()


def resident(kind: str) -> int:
    """Bytes of this process that lie in memory: "VmRSS" now, "VmHWM" the most since `reset`."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(kind)).split()[1])


def peak(action: Callable[[], Any]) -> int:
    """Bytes that an action takes at most, beyond what is held before it."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed, and would serve the action unseen
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    action()
    return resident("VmHWM") - before


@pytest.mark.parametrize(("name", "is_packed"), CASES)
def test_a_reader_takes_four_times_what_a_file_says(name: str, is_packed: bool, tmp_path: Path, on_cpu: None) -> None:
    form = FORMS[name]
    content = form.content()
    says = form.says or len(content)
    assert says >= SIZE // 2
    path = tmp_path / (f"{form.name}.gz" if is_packed else form.name)
    path.write_bytes(gzip.compress(content, compresslevel=1) if is_packed else content)
    del content
    form.read(path)  # what is imported, compiled and cached once is no part of it
    # An array that lies well is no copy on the device, which is a matter of luck: what it needs shows in one of three.
    peaks: list[int] = []
    while len(peaks) < 3 and min(peaks, default=np.inf) > 4 * says + BLOCKS:
        peaks.append(peak(lambda: form.read(path)))
    assert min(peaks) <= 4 * says + BLOCKS
