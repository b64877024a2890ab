"""Downloads, against a server on this machine that misbehaves on demand."""

import fcntl
import gzip
import hashlib
import threading
from collections.abc import Callable, Iterator
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from spdnn_jax.graph_challenge import download as module
from spdnn_jax.graph_challenge.download import download, official_paths

CONTENT = bytes(range(256)) * 20000
ETAG = '"version-1"'
PART = "file.%22version-1%22.part"


class Server(ThreadingHTTPServer):
    """Serves `content`; the rest says how it misbehaves."""

    content = CONTENT
    cuts = 0  # answers that break off half way
    reset_after: int | None = None  # bytes of every answer
    resumes = True
    etag: str | None = ETAG
    answers: list[Callable[["Handler"], None]]  # instead of the file, one after the other
    requests: list[Message]


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        server = self.server
        server.requests.append(self.headers)
        if server.answers:
            server.answers.pop(0)(self)
            return
        if self.path not in ("/file", "/file.gz"):
            self.send_error(404)
            return
        requested = self.headers.get("Range") if self.headers.get("If-Range") == server.etag else None
        first = int(requested.removeprefix("bytes=").rstrip("-")) if requested and server.resumes else 0
        size = len(server.content)
        if first and first >= size:
            self.answer(416, {"Content-Range": f"bytes */{size}"})
            return
        ranges = {"Content-Range": f"bytes {first}-{size - 1}/{size}"} if first else {}
        end = (first + size) // 2 if server.cuts > 0 else min(first + (server.reset_after or size), size)
        server.cuts -= 1
        self.answer(206 if first else 200, ranges, server.content[first:end], size - first)

    def answer(self, status: int, headers: dict[str, str], body: bytes = b"", length: int | None = None) -> None:
        """Sends an answer that announces `length`: by default, what it has; -1: nothing."""
        self.send_response(status)
        length = len(body) if length is None else length
        if length >= 0:
            headers = {"Content-Length": str(length)} | headers
        if self.server.etag:
            headers = {"ETag": self.server.etag} | headers
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests, running.answers = [], []
        thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield running
        running.shutdown()


def url(server: Server, path: str = "file") -> str:
    return f"http://127.0.0.1:{server.server_port}/{path}"


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def ranges(server: Server) -> list[str | None]:
    return [headers.get("Range") for headers in server.requests]


def test_fetches_with_progress(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int | None]] = []
    path = download(url(server), tmp_path / "file", progress=lambda *state: seen.append(state))
    assert path.read_bytes() == CONTENT
    assert seen[0] == ("file", 0, len(CONTENT))
    assert seen[-1] == ("file", len(CONTENT), len(CONTENT))
    assert names(tmp_path) == ["file"]


def test_goes_on_after_cuts(server: Server, tmp_path: Path) -> None:
    server.cuts = 3
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 4
    assert server.requests[-1]["If-Range"] == ETAG
    assert ranges(server)[-1] != ranges(server)[1]


def test_resets_lose_nothing(server: Server, tmp_path: Path) -> None:
    """Each answer brings 50 kB: less than a read, and far more of them than attempts."""
    server.content, server.reset_after = CONTENT[:1_000_000], 50_000
    assert download(url(server), tmp_path / "file").read_bytes() == server.content
    assert ranges(server)[1:] == [f"bytes={k}-" for k in range(50_000, 1_000_000, 50_000)]


def test_goes_on_in_a_later_call(server: Server, tmp_path: Path) -> None:
    server.reset_after = 1000
    server.answers = [lambda handler: handler.answer(200, {}, CONTENT[:5000], len(CONTENT))] + [
        lambda handler: handler.answer(503, {})
    ] * 5
    with pytest.raises(OSError, match=r"5 attempts failed \(the server answers 503 .*call again to go on"):
        download(url(server), tmp_path / "file")
    assert names(tmp_path) == [PART]
    server.reset_after = None
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert ranges(server)[-1] == "bytes=5000-"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    server.answers = [lambda handler: handler.answer(status, {"Retry-After": "0"})] * 3
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("resumes", [True, False])
def test_a_file_that_changed_is_not_glued_together(server: Server, tmp_path: Path, resumes: bool) -> None:
    """Half of one version and half of another have the size of either."""
    (tmp_path / PART).write_bytes(CONTENT[:1000])
    server.content, server.etag, server.resumes = CONTENT[::-1], '"version-2"', resumes
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT[::-1]
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"},  # not where we stopped
        {"Content-Range": f"bytes 1000-2000/{len(CONTENT)}"},  # not to the end
        {"Content-Range": "bytes 1000-"},
        {},
        {"Content-Range": f"bytes 1000-{len(CONTENT) - 1}/{len(CONTENT)}", "ETag": '"version-2"'},
    ],
)
def test_an_answer_that_does_not_go_on_where_we_stopped(
    server: Server, tmp_path: Path, headers: dict[str, str]
) -> None:
    (tmp_path / PART).write_bytes(CONTENT[:1000])
    server.answers = [lambda handler: handler.answer(206, headers, b"x" * (len(CONTENT) - 1000))]
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


def test_a_whole_partial_file_is_taken(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT)
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert len(server.requests) == 1


def test_a_partial_file_that_is_too_long_is_removed(server: Server, tmp_path: Path) -> None:
    (tmp_path / PART).write_bytes(CONTENT + b"x")
    with pytest.raises(ValueError, match="longer than the server's"):
        download(url(server), tmp_path / "file")
    assert not names(tmp_path)


def test_files_of_others_are_left_alone(server: Server, tmp_path: Path) -> None:
    for name in ("file.part", "file.mine.part", "file"):
        (tmp_path / name).write_bytes(b"mine")
    assert download(url(server), tmp_path / "file").read_bytes() == b"mine"
    assert server.requests == []
    (tmp_path / "file").unlink()
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    assert names(tmp_path) == ["file", "file.mine.part", "file.part"]
    assert (tmp_path / "file.part").read_bytes() == b"mine"


def test_two_downloads_of_one_file_do_not_mix(server: Server, tmp_path: Path) -> None:
    with (tmp_path / PART).open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OSError, match="another download of the file is under way"):
            download(url(server), tmp_path / "file")
    assert names(tmp_path) == [PART]


def test_a_link_is_followed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "file").symlink_to("there/file")
    download(url(server), tmp_path / "file")
    assert (tmp_path / "file").is_symlink()
    assert (tmp_path / "there" / "file").read_bytes() == CONTENT


def test_checksums(server: Server, tmp_path: Path) -> None:
    right = hashlib.sha256(CONTENT).hexdigest()
    assert download(url(server), tmp_path / "right", sha256=right).read_bytes() == CONTENT
    with pytest.raises(ValueError, match="sha256"):
        download(url(server), tmp_path / "wrong", sha256="0" * 64)
    assert names(tmp_path) == ["right"]


@pytest.mark.parametrize(("etag", "good"), [("right", True), ('"' + "0" * 32 + '"', False), ('"abc-7"', True)])
def test_etag_that_is_an_md5_is_checked(server: Server, tmp_path: Path, etag: str, good: bool) -> None:
    server.etag = f'"{hashlib.md5(CONTENT).hexdigest()}"' if etag == "right" else etag
    if good:
        assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    else:
        with pytest.raises(ValueError, match="md5"):
            download(url(server), tmp_path / "file")
        assert not names(tmp_path)


@pytest.mark.parametrize("cut", [0, 1000])
def test_a_body_without_a_length_needs_a_checksum(server: Server, tmp_path: Path, cut: int) -> None:
    """Where the server neither says how long the file is nor what its checksum is, a cut file looks whole."""

    def endless(handler: Handler) -> None:
        handler.answer(200, {}, CONTENT[: len(CONTENT) - cut], -1)

    server.answers = [endless] * 2
    with pytest.raises(OSError, match="does not say how long the file is"):
        download(url(server), tmp_path / "file")
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    if cut:
        with pytest.raises(ValueError, match="sha256"):
            download(url(server), tmp_path / "file", sha256=sha256)
        assert not names(tmp_path)
    else:
        assert download(url(server), tmp_path / "file", sha256=sha256).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("status", "headers", "body", "message"),
    [
        (204, {}, b"", "answers 204"),
        (200, {}, b"", "an empty file"),
        (200, {"Content-Type": "text/html; charset=utf-8"}, b"please log in", "a web page"),
        (200, {}, b"\n <!DOCTYPE html>\n<title>log in", "a web page"),
        (200, {"Content-Encoding": "gzip"}, gzip.compress(b"1\n", mtime=0), r"sends the file encoded \(gzip\)"),
        (200, {}, b"1\t1\t1\n", "not in gzip form"),
        (302, {"Location": "file:///etc/passwd"}, b"", "answers 302 .*file:///etc/passwd"),
        (302, {"Location": "ftp://127.0.0.1/file"}, b"", "leads to ftp"),
        (404, {}, b"", r"file\.gz: the server answers 404 .*check --base_url"),
    ],
)
def test_what_is_not_the_file_is_not_kept(
    server: Server, tmp_path: Path, status: int, headers: dict[str, str], body: bytes, message: str
) -> None:
    server.answers = [lambda handler: handler.answer(status, headers, body)]
    with pytest.raises(OSError, match=message):
        download(url(server, "file.gz"), tmp_path / "file.gz")
    assert not names(tmp_path)


def test_a_redirect_to_another_host_is_followed(server: Server, tmp_path: Path) -> None:
    there = url(server).replace("127.0.0.1", "localhost")
    server.answers = [lambda handler: handler.answer(302, {"Location": there})]
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT


def test_a_server_that_stalls_is_left(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TIMEOUT", 0.5)
    done = threading.Event()

    def stall(handler: Handler) -> None:
        handler.answer(200, {}, CONTENT[:1000], len(CONTENT))
        done.wait(10)

    server.answers = [stall]
    assert download(url(server), tmp_path / "file").read_bytes() == CONTENT
    done.set()
    assert ranges(server) == [None, "bytes=1000-"]


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://127.0.0.1/x", "nothing", "http://127.0.0.1:abc/x"])
def test_an_address_that_is_none_is_named(tmp_path: Path, address: str) -> None:
    with pytest.raises(ValueError, match="not an address that can be fetched"):
        download(address, tmp_path / "file")
    assert not names(tmp_path)


def test_no_server_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAUSE", 0.001)
    with pytest.raises(OSError, match=r"5 attempts failed|cannot be reached"):
        download("http://127.0.0.1:9/file", tmp_path / "file")


def test_official_paths() -> None:
    assert official_paths(1024, 120) == [
        "dnn/neuron1024.tar.gz",
        "mnist/sparse-images-1024.tsv.gz",
        "dnn/neuron1024-l120-categories.tsv",
    ]
