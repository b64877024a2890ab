"""Every reader, given damaged files: an error of one kind or a result, never a crash, a hang or all memory.

A file that is sealed by checksums gives what it gave before, or is refused; a form without any cannot tell a changed
number from another one. `make fuzz` tries a million inputs, the tests some hundreds.
"""

import contextlib
import gzip
import io
import os
import resource
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.io
import scipy.sparse as sp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from spdnn_jax import Clip, Plan, SparseNetwork, build_plan
from spdnn_jax.command_line.report import read_reports
from spdnn_jax.graph_challenge import networks, official_files, radixnet
from spdnn_jax.graph_challenge.inputs import read_idx_images
from spdnn_jax.io import read_array, read_network
from tests.conftest import FUZZ, official_archive, random_network

HEADROOM = 64 << 20  # bytes that a reader may take beyond what the process has: a block of text, and what is made of it
NEURONS = 32
TOKENS = (
    b"0",
    b"-1",
    b"4294967295",
    b"9223372036854775808",
    b"1e400",
    b"nan",
    b"-",
    b"\t",
    b"\n",
    b"\0",
    b"\xff",
    b'"',
    b"{",
    b"[",
    b",",
)


@dataclass(frozen=True)
class Form:
    """A form of file.

    Attributes:
        name: The file's, which may say what it is.
        content: An undamaged file.
        read: Reads the file at a path; returns a pytree of arrays and numbers.
        is_sealed: Whether checksums of its own cover all that counts.
        is_packed: Whether it is a gzip stream, whose checksum does.
    """

    name: str
    content: bytes
    read: Callable[[Path], Any]
    is_sealed: bool = False
    is_packed: bool = False

    def packed(self) -> "Form":
        """The same in gzip, whose checksum covers it."""
        name = self.name if self.name.endswith(".gz") else f"{self.name}.gz"
        return Form(name, gzip.compress(self.content, mtime=0), self.read, self.is_sealed, is_packed=True)


def written(write: Callable[..., Any], *arguments: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    write(buffer, *arguments, **options)
    return buffer.getvalue()


def layer_text() -> bytes:
    (layer,) = radixnet.layers(NEURONS, 1)
    outputs = np.repeat(np.arange(NEURONS), np.diff(layer.indptr))
    return "".join(f"{i + 1}\t{j + 1}\t0.0625\n" for i, j in zip(layer.indices, outputs, strict=True)).encode()


def state_dict(matrix: Any) -> dict[str, np.ndarray]:
    rows: Any = sp.csr_array(matrix.T)
    return {
        "0.weight.crow_indices": rows.indptr.astype(np.int64),
        "0.weight.col_indices": rows.indices.astype(np.int64),
        "0.weight.values": rows.data,
        "1.weight": np.eye(rows.shape[0], dtype=np.float32),
        "1.bias": np.ones(rows.shape[0], np.float16),
    }


def forms(folder: Path) -> dict[str, Form]:
    network = random_network(0, [7, 5, 6], activation=[Clip.relu(), Clip(-1, 1)])
    matrix = network.layers[0].to_scipy()
    network.save(folder / "network")
    build_plan(network).save(folder / "plan")

    def of_network(path: Path) -> SparseNetwork:
        return read_network(path, activation=Clip.relu())

    def mapped(path: Path) -> np.ndarray:
        plan = Plan.open(path)
        return np.concatenate([np.asarray(plan.cut(layer, layer + 1).words) for layer in range(plan.layers)])

    idx = bytes([0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 4]) + bytes(range(32))
    pixels = "".join(f"{1 + k // 3}\t{1 + k % 3}\t1\n" for k in range(12)).encode()
    report = b'[{"network": "1024 x 2", "neurons": 1024, "layers": 2, "features": 3, "inputs": "digits", "device": "x",'
    report += b'"compress": "none", "active": [3, 2], "multiplied_edges": [5, 5], "seconds": {"inference": 0.25}}]'
    plain = {
        "layer": Form("l.tsv", layer_text(), lambda path: official_files.read_layer(path, NEURONS)),
        "inputs": Form(
            f"sparse-images-{NEURONS}.tsv", pixels, lambda path: official_files.features(path.parent, NEURONS, 4)
        ),
        "archive": Form(
            f"neuron{NEURONS}.tar.gz",
            official_archive(NEURONS, layer_text()),
            lambda path: list(official_files.layers(path, NEURONS, 2)),
        ),
        "idx": Form("images", idx, read_idx_images),
        "network": Form("network.safetensors", (folder / "network").read_bytes(), of_network, is_sealed=True),
        "state dict": Form("s.safetensors", safetensors.numpy.save(state_dict(matrix)), of_network),
        "scipy": Form("m.npz", written(sp.save_npz, matrix), of_network),
        "matrix market": Form("m.mtx", written(scipy.io.mmwrite, matrix), of_network),
        "edges": Form("edges", b"1\t2\t0.5\n3\t2\t-1.5\n3\t4\t2\n", of_network),
        "npy": Form("x.npy", written(np.save, np.arange(12.0).reshape(3, 4)), read_array),
        "npz": Form("x.npz", written(np.savez_compressed, x=np.arange(12).reshape(3, 4)), read_array),
        "sparse array": Form("x.npz", written(sp.save_npz, matrix), read_array),
        "dense market": Form("x.mtx", written(scipy.io.mmwrite, matrix.toarray()), read_array),
        "sparse market": Form("x.mtx", written(scipy.io.mmwrite, matrix), read_array),
        "text": Form("x.txt", b"1,2.5,-3\n4,5,6e-3\n", read_array),
    }
    return {
        **plain,
        **{f"{name} in gzip": form.packed() for name, form in plain.items()},
        "plan": Form("plan", (folder / "plan").read_bytes(), lambda path: Plan.load(path).words, is_sealed=True),
        "mapped plan": Form("plan", (folder / "plan").read_bytes(), mapped, is_sealed=True),
        "categories": Form("c.tsv", b"1\n5\n7\n60000\n", networks.read_categories),
        "report": Form("r.json", report, lambda path: len(read_reports([path]))),
    }


PLAIN = (
    *("layer", "inputs", "archive", "idx", "network", "state dict", "scipy", "matrix market", "edges", "npy", "npz"),
    *("sparse array", "dense market", "sparse market", "text"),
)
NAMES = (*PLAIN, *(f"{name} in gzip" for name in PLAIN), "plan", "mapped plan", "categories", "report")


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(content: bytearray, at: int, payload: bytes) -> None:
    content[at] ^= 1 << payload[0] % 8


def overwrite(content: bytearray, at: int, payload: bytes) -> None:
    content[at : at + len(payload)] = payload


def insert(content: bytearray, at: int, payload: bytes) -> None:
    content[at:at] = payload


def delete(content: bytearray, at: int, payload: bytes) -> None:
    del content[at : at + payload[0]]


def cut(content: bytearray, at: int, _: bytes) -> None:
    del content[at:]


def double(content: bytearray, at: int, payload: bytes) -> None:
    content[at:at] = content[at : at + 8 * payload[0]]


NUMBERS = [number.to_bytes(size, order) for size in (4, 8) for order in ("little", "big")
           for number in (0, 1, (1 << 8 * size) - 1, 1 << (8 * size - 1), 1 << (8 * size - 2), 1 << 20)]  # fmt: skip
EDITS = st.tuples(
    st.sampled_from((flip, overwrite, insert, delete, cut, double)),
    st.integers(0, (1 << 16) - 1),
    st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from(NUMBERS), st.sampled_from(TOKENS)),
)


def damaged(content: bytes, edits: list[Any]) -> bytes:
    result = bytearray(content)
    for edit, place, payload in edits:
        if result:
            edit(result, place * len(result) >> 16, payload)
    return bytes(result)


# --- the test ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def bounded_memory() -> Iterator[None]:
    """Within it, a header that lies about some MiB ends in a MemoryError, which is none of the errors allowed."""
    pages = int(Path("/proc/self/statm").read_text().split()[5])
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (pages * os.sysconf("SC_PAGE_SIZE") + HEADROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def is_the_same(form: Form, content: bytes) -> bool:
    """Whether a file that can be read must give what the undamaged one gives.

    A damaged stream may be no gzip stream any more, or hold another one behind the first.
    """
    if not form.is_packed or form.is_sealed:
        return form.is_sealed
    try:
        return gzip.decompress(content) == gzip.decompress(form.content)
    except (OSError, EOFError, zlib.error):
        return content.startswith(form.content[:2])  # it must have been refused


def assert_equal(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.fixture(scope="module")
def all_forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Form]:
    return forms(tmp_path_factory.mktemp("forms"))


@pytest.mark.parametrize("name", NAMES)
def test_damaged_files(name: str, all_forms: dict[str, Form], tmp_path: Path) -> None:
    form = all_forms[name]
    path = tmp_path / form.name
    path.write_bytes(form.content)
    expected = form.read(path)

    @settings(
        max_examples=1_000_000 // len(NAMES) if FUZZ else 40,
        deadline=None,
        database=None,
        derandomize=not FUZZ,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
        phases=[Phase.generate, Phase.shrink],
    )
    @given(st.lists(EDITS, min_size=1, max_size=4))
    def read_damaged(edits: list[Any]) -> None:
        content = damaged(form.content, edits)
        path.write_bytes(content)
        with bounded_memory():
            try:
                found = form.read(path)
            except (ValueError, OSError):
                return
        if is_the_same(form, content):
            assert_equal(found, expected)

    read_damaged()
