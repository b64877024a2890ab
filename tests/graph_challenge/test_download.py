"""Downloads, against a server on this machine that misbehaves on demand."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spdnn_jax.graph_challenge.download import download, official_paths

CONTENT = bytes(range(256)) * 20000


class Server(ThreadingHTTPServer):
    """Serves CONTENT; `cuts` is how many answers break off half way, `resumes` whether it knows ranges."""

    cuts = 0
    resumes = True
    etag: str | None = None
    requests: list[str | None]


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        requested = self.headers.get("Range")
        self.server.requests.append(requested)
        if self.path != "/file":
            self.send_error(404)
            return
        first = int(requested.removeprefix("bytes=").rstrip("-")) if requested and self.server.resumes else 0
        if first and first >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.end_headers()
            return
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(len(CONTENT) - first))
        if self.server.etag:
            self.send_header("ETag", self.server.etag)
        self.end_headers()
        if self.server.cuts > 0:
            self.server.cuts -= 1
            self.wfile.write(CONTENT[first : (first + len(CONTENT)) // 2])
            return
        self.wfile.write(CONTENT[first:])

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.shutdown()


def url(server: Server, path: str = "file") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def test_fetches_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = download(url(server), tmp_path / "file", progress=lambda *state: seen.append(state))
    assert path.read_bytes() == CONTENT
    assert seen[0] == ("file", 0, len(CONTENT))
    assert seen[-1] == ("file", len(CONTENT), len(CONTENT))
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_goes_on_after_cuts(server: Server, tmp_path: Path) -> None:
    server.cuts = 3
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 4
    assert server.requests[-1] != server.requests[1]


def test_goes_on_in_a_later_call(server: Server, tmp_path: Path) -> None:
    server.cuts = 10**6
    with pytest.raises(OSError, match="call again to go on"):
        download(url(server), tmp_path / "file")
    assert not (tmp_path / "file").exists()
    have = (tmp_path / "file.part").stat().st_size
    server.cuts = 0
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert server.requests[-1] == f"bytes={have}-"


def test_a_server_without_ranges_starts_over(server: Server, tmp_path: Path) -> None:
    """Appending a whole answer to a partial file would corrupt it."""
    server.resumes = False
    (tmp_path / "file.part").write_bytes(CONTENT[:1000])
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_partial_file_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT)
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


def test_a_partial_file_that_is_too_long_is_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.part").write_bytes(CONTENT + b"x")
    with pytest.raises(ValueError, match="longer than the server's"):
        download(url(server), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_checksums(server: Server, tmp_path: Path) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    assert download(url(server), tmp_path / "right", sha256=right).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="sha256"):
        download(url(server), tmp_path / "wrong", sha256="0" * 64)
    assert [file.name for file in tmp_path.iterdir()] == ["right"]


@pytest.mark.parametrize(("etag", "good"), [("right", True), ('"' + "0" * 32 + '"', False), ('"abc-7"', True)])
def test_etag_that_is_an_md5_is_checked(server: Server, tmp_path: Path, etag: str, good: bool) -> None:
    server.etag = f'"{hashlib.md5(CONTENT).hexdigest()}"' if etag == "right" else etag
    if good:
        assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    else:
        with pytest.raises(ValueError, match="md5"):
            download(url(server), tmp_path / "file")
        assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_left_alone(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    assert download(url(server), tmp_path / "file").read_bytes() == b"mine"
    assert server.requests == []


def test_a_missing_file_is_named(server: Server, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nothing: the server answers 404"):
        download(url(server, "nothing"), tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_no_server_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"connection broke|cannot be reached"):
        download("http://127.0.0.1:9/file", tmp_path / "file")


def test_official_paths() -> None:
    assert official_paths(1024, 120) == [
        "dnn/neuron1024.tar.gz",
        "mnist/sparse-images-1024.tsv.gz",
        "dnn/neuron1024-l120-categories.tsv",
    ]
