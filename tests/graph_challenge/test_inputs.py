"""Input features."""

import contextlib
import gzip
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spdnn_jax.graph_challenge import inputs, oracle, radixnet


def test_digits_are_distinct_seeded_and_sparse() -> None:
    images = inputs.digits(1024, 3000, seed=1)
    assert images.shape == (3000, 1024)
    assert images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 3000
    assert 0.08 < images.mean() < 0.12
    assert set(np.unique(images)) == {0, 1}
    np.testing.assert_array_equal(images, inputs.digits(1024, 3000, seed=1))
    assert not np.array_equal(images, inputs.digits(1024, 3000, seed=2))


def test_a_few_percent_of_the_digits_stay_active() -> None:
    """Inputs that all die, or all live, would make the challenge's tail trivial."""
    alive = oracle.infer(radixnet.layers(1024, 30), inputs.digits(1024, 2000)).categories
    assert 0.005 < alive.mean() < 0.1


def test_so_many_distinct_digits_may_not_exist() -> None:
    with pytest.raises(ValueError, match="distinct digits"):
        inputs.digits(16, 60000)


def write_mnist(folder: Path, images: np.ndarray, packed: bool = True) -> Path:
    content = struct.pack(">4I", 0x803, *images.shape) + images.tobytes()
    path = folder / f"train-images-idx3-ubyte{'.gz' if packed else ''}"
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


@pytest.mark.parametrize("packed", [True, False])
def test_mnist_at_its_own_size_is_a_threshold(tmp_path: Path, packed: bool) -> None:
    """At 28 x 28 the resize changes nothing; flattening goes column by column."""
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28), np.uint8)
    write_mnist(tmp_path, images, packed)
    result = inputs.mnist(tmp_path, 784, 5)
    np.testing.assert_array_equal(result, (images > 0.72 * 255).transpose(0, 2, 1).reshape(5, -1))


@pytest.mark.parametrize("neurons", [256, 1024, 4096])
def test_resize_keeps_a_smooth_image(tmp_path: Path, neurons: int) -> None:
    """A wave of one period stays one at every resolution, where its samples fall."""
    position = np.arange(28) / 28
    wave = 127.5 + 120 * np.cos(2 * np.pi * (position[:, None] - 0.3))
    images = np.broadcast_to(wave, (1, 28, 28)).round().astype(np.uint8)
    write_mnist(tmp_path, images)
    side = int(neurons**0.5)
    expected = 127.5 + 120 * np.cos(2 * np.pi * (np.arange(side) / side - 0.3)) >= 0.72 * 255
    got = inputs.mnist(tmp_path, neurons, 1).reshape(side, side)  # (column, row)
    np.testing.assert_array_equal(got, np.broadcast_to(expected, (side, side)))


def test_mnist_of_the_challenge(shared_data: Path) -> None:
    images = inputs.mnist(shared_data / "mnist", 1024, 500)
    assert 0.08 < images.mean() < 0.12


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "cut short or too long"),
        (lambda content: b"\0\0\0\0" + content[4:], "not an IDX file"),
        (lambda content: b"", "not an IDX file"),
    ],
)
def test_corrupt_mnist_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = write_mnist(tmp_path, np.zeros((2, 28, 28), np.uint8), packed=False)
    path.write_bytes(damage(path.read_bytes()))  # pyright: ignore[reportCallIssue]
    with pytest.raises(ValueError, match=message):
        inputs.mnist(tmp_path, 1024, 2)


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    yield
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 1 << 27, 1 << 27), "announces entries of 134217728 x 134217728 numbers"),
        ((1, 0, 0), "announces entries of 0 x 0"),
        ((1, 28, 56), "not square"),
        ((3, 28, 28), "announces 3 entries, but is cut short or too long"),
        (((1 << 32) - 1, 28, 28), "announces 4,294,967,295 entries, but is cut short"),
    ],
)
@pytest.mark.parametrize("packed", [True, False])
def test_a_header_that_lies_takes_no_memory(
    tmp_path: Path, shape: tuple[int, int, int], message: str, packed: bool
) -> None:
    content = struct.pack(">4I", 0x803, *shape) + bytes(28 * 56)
    (tmp_path / "train-images-idx3-ubyte").write_bytes(gzip.compress(content) if packed else content)
    with little_memory(), pytest.raises(ValueError, match=message):
        inputs.mnist(tmp_path, 1024, 1)


def test_a_gzip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """What a header does not announce is not unpacked: 64 MB of zeros behind one image."""
    content = struct.pack(">4I", 0x803, 1, 28, 28) + bytes(64 << 20)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(content, 1))
    with little_memory(), pytest.raises(ValueError, match="too long"):
        inputs.mnist(tmp_path, 1024, 1)


@pytest.mark.parametrize("folder", ["MNIST/raw", "raw", "train-images-idx3-ubyte", "."])
@pytest.mark.parametrize("packed", [True, False])
def test_mnist_is_found_where_others_put_it(tmp_path: Path, folder: str, packed: bool) -> None:
    """As torchvision keeps it, in MNIST/raw; as Kaggle's archive does, in a folder by the file's own name."""
    (tmp_path / folder).mkdir(parents=True, exist_ok=True)
    path = write_mnist(tmp_path / folder, np.full((2, 28, 28), 255, np.uint8), packed)
    path.rename(path.with_name("train-images-idx3-ubyte"))
    assert inputs.mnist(tmp_path, 784, 2).all()


def test_cut_gzip_is_named(tmp_path: Path) -> None:
    path = write_mnist(tmp_path, np.zeros((2, 28, 28), np.uint8))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match="gzip stream is corrupt"):
        inputs.mnist(tmp_path, 1024, 2)


def test_missing_mnist_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--mnist_dir"):
        inputs.mnist(tmp_path, 1024, 2)
    write_mnist(tmp_path, np.zeros((2, 28, 28), np.uint8))
    with pytest.raises(ValueError, match="holds 2 images, 3 were asked for"):
        inputs.mnist(tmp_path, 1024, 3)


@pytest.mark.parametrize("make", [inputs.digits, inputs.random])
def test_zero_features_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match="at least one feature"):
        make(1024, 0)  # pyright: ignore[reportCallIssue]


def test_images_need_a_square() -> None:
    with pytest.raises(ValueError, match="square number"):
        inputs.digits(2048, 10)


@pytest.mark.parametrize("pixels", [1, 5000])
def test_resizing_in_pieces_changes_nothing(pixels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by working on a few images at a time; the features must not depend on how many."""
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28), np.uint8)
    write_mnist(tmp_path, images)
    whole = inputs.digits(1024, 50), inputs.mnist(tmp_path, 1024, 7)
    monkeypatch.setattr(inputs, "_CHUNK_PIXELS", pixels)
    np.testing.assert_array_equal(inputs.digits(1024, 50), whole[0])
    np.testing.assert_array_equal(inputs.mnist(tmp_path, 1024, 7), whole[1])


@pytest.mark.parametrize("density", [-0.1, 1.5, float("nan")])
def test_density_is_a_share(density: float) -> None:
    with pytest.raises(ValueError, match="density must lie between 0 and 1"):
        inputs.random(64, 3, density)


def test_random_has_the_density_asked_for() -> None:
    result = inputs.random(100, 2500, density=0.3, seed=5)
    assert abs(result.mean() - 0.3) < 0.01
