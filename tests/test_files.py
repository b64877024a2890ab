"""Files that are written whole or not at all: in the way of no device, link, mode or file of the user's."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from spdnn_jax import _files
from spdnn_jax._files import check_writable, replacing


def write(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


@pytest.fixture(params=["nameless", "named"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With file systems that know files without a name, and without."""
    if request.param == "named":
        monkeypatch.setattr(_files, "_NAMELESS", None)


def test_a_file_appears_whole(tmp_path: Path, kind: None) -> None:
    path = tmp_path / "räport file.json"
    with replacing(path) as file:
        file.write(b"half")
        file.flush()
        assert not path.exists()
        file.seek(0)
        file.write(b"w")
    assert path.read_bytes() == b"walf"
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_failure_leaves_what_was_there(tmp_path: Path, kind: None) -> None:
    path, own = tmp_path / "r.json", tmp_path / "r.json.part"
    path.write_bytes(b"old")
    own.write_bytes(b"the user's own")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert (path.read_bytes(), own.read_bytes()) == (b"old", b"the user's own")
    write(path)
    assert (path.read_bytes(), own.read_bytes()) == (b"new", b"the user's own")
    assert len(list(tmp_path.iterdir())) == 2


def test_links_modes_and_owners_stay(tmp_path: Path, kind: None) -> None:
    (tmp_path / "there").mkdir()
    target, link, dangling = tmp_path / "there" / "file", tmp_path / "link", tmp_path / "dangling"
    target.write_bytes(b"old")
    target.chmod(0o640)
    if os.geteuid() == 0:
        os.chown(target, 12345, 12346)
    owner = (target.stat().st_uid, target.stat().st_gid)
    link.symlink_to("there/file")
    dangling.symlink_to("there/later")
    write(link)
    write(dangling)
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (target.read_bytes(), (tmp_path / "there" / "later").read_bytes()) == (b"new", b"new")
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert (target.stat().st_uid, target.stat().st_gid) == owner
    assert sorted(file.name for file in target.parent.iterdir()) == ["file", "later"]


def test_a_device_a_fifo_and_standard_output_are_written_through(tmp_path: Path) -> None:
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    check_writable(fifo)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(fifo.read_bytes()))
    reader.start()
    write(fifo)
    reader.join()
    assert received == [b"new"]
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    program = "from spdnn_jax._files import replacing\nprint('first', flush=True)\n"
    program += "with replacing('/dev/stdout') as file: file.write(b'second')"
    with (tmp_path / "out").open("wb") as out:
        subprocess.run([sys.executable, "-c", program], stdout=out, check=True)
    assert b"second" in (tmp_path / "out").read_bytes()


def test_what_cannot_be_written_is_named_before_and_after(tmp_path: Path, kind: None) -> None:
    for path, error in (
        (tmp_path, IsADirectoryError),
        (tmp_path / "none" / "file", FileNotFoundError),
        (Path("/proc/file"), OSError),
    ):
        for attempt in (check_writable, write):
            with pytest.raises(error, match=str(path)):
                attempt(path)


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB: as a full disk does, this fails in the middle of a write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_names_the_file(tmp_path: Path, small_files: None, kind: None) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match=r"r\.json") as caught:
        write(path, bytes(1 << 20))
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old"
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]


def test_another_file_s_error_is_not_blamed_on_this_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"), replacing(tmp_path / "file"):
        (tmp_path / "absent").read_bytes()


def test_sigkill_leaves_nothing(tmp_path: Path) -> None:
    program = "import os, sys\nfrom spdnn_jax._files import replacing\n"
    program += "with replacing(sys.argv[1]) as file:\n file.write(bytes(1 << 20)); os.kill(os.getpid(), 9)"
    (tmp_path / "file").write_bytes(b"old")
    killed = subprocess.run([sys.executable, "-c", program, str(tmp_path / "file")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    try:
        os.close(os.open(tmp_path, os.O_TMPFILE | os.O_RDWR))
    except OSError:
        pytest.skip(f"the file system of {tmp_path} knows no files without a name")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_unfinished_files_are_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_files, "_NAMELESS", None)
    with replacing(tmp_path / ("n" * 255)):
        (unfinished,) = tmp_path.iterdir()
        assert unfinished.name.startswith(_files._PRIVATE)
