"""Fetches the official files of the challenge: with progress, resume, and checks of size, checksum and kind."""

import contextlib
import fcntl
import glob
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from email.message import Message
from pathlib import Path
from typing import Any

BASE_URL = "https://graphchallenge.s3.amazonaws.com/synthetic/sparsechallenge_2019"
"""The challenge's public bucket."""

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are there, and the bytes it will have (None: unknown)."""

_BLOCK = 1 << 20
_ATTEMPTS = 5  # in a row that bring nothing
_TIMEOUT = 60.0  # seconds without a byte
_PAUSE = 0.5  # seconds before the second attempt, doubled before each further one
_LONGEST_PAUSE = 30.0
_COME_BACK = (408, 425, 429, 500, 502, 503, 504)  # answers of a server that may do better in a moment
_NO_FILE = "the server sends a web page, not the file: a log-in or an error? Look at the address in a browser"
_LONGEST_VALIDATOR = 120  # characters that a file's name has room for


def official_paths(neurons: int, layers: int) -> list[str]:
    """Paths below the base URL of the files of one network: weights, inputs, truth."""
    return [
        f"dnn/neuron{neurons}.tar.gz",
        f"mnist/sparse-images-{neurons}.tsv.gz",
        f"dnn/neuron{neurons}-l{layers}-categories.tsv",
    ]


def download(
    url: str,
    target: str | os.PathLike[str],
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Fetches one file, in one piece or not at all.

    What arrives is kept beside the target until it is whole, in ``<target>.<validator>.part``, named for the version
    of the file that the server announced (its ETag, or else Last-Modified). This call, and later ones, go on from there
    if the server still has that version. The size is checked against what the server announces, the content against
    `sha256` or, where the server gives one, the MD5 in its ETag.

    Args:
        url: Where the file is, by http or https.
        target: Where it goes. A file that is there already is left alone.
        sha256: The expected digest, in hexadecimal.
        progress: See `Progress`.

    Returns:
        The target.

    Raises:
        OSError: The server cannot be reached, does not have the file, or sends something else; or the target cannot be
            written, or another download of it is under way.
        ValueError: The address is none, or size or checksum are wrong; then the partial file is removed.
    """
    target = Path(target)
    if target.exists():
        return target
    if urllib.parse.urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{url}: not an address that can be fetched: it has to begin with http:// or https://")
    fetch = _Fetch(url, Path(os.path.realpath(target)), progress or (lambda name, done, total: None))
    with contextlib.closing(fetch.run(has_digest=sha256 is not None)) as partial:
        _check_digest(url, partial, sha256)
        _check_content(url, partial)
        partial.path.replace(fetch.target)
    return target


class _Partial:
    """What has arrived of one version of a file: a file of its own, locked against other downloads."""

    def __init__(self, path: Path, validator: str | None) -> None:
        self.path, self.validator = path, validator
        self.file = path.open("ab+", buffering=0)
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise OSError(f"{path}: another download of the file is under way: wait for it") from None
        except OSError:
            pass  # a file system without locks

    @classmethod
    def new(cls, target: Path, validator: str | None) -> "_Partial":
        name = f"{target.name}.{urllib.parse.quote(validator or 'unknown', safe='')}.part"
        partial = cls(target.with_name(name), validator)
        partial.file.truncate(0)
        return partial

    @classmethod
    def left_by_an_earlier_call(cls, target: Path) -> "_Partial | None":
        for path in target.parent.glob(f"{glob.escape(target.name)}.*.part"):
            validator = urllib.parse.unquote(path.name[len(target.name) + 1 : -len(".part")])
            if _is_validator(validator):  # else it is another program's
                return cls(path, validator)
        return None

    def size(self) -> int:
        return os.fstat(self.file.fileno()).st_size

    def close(self) -> None:
        self.file.close()

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        self.close()


def _is_validator(text: str) -> bool:
    """Whether this is a strong ETag or a date, with which a server can be asked whether it still has that version."""
    return bool(re.fullmatch(r'"[\x21\x23-\x7e]*"|[A-Z][a-z]{2}, \d\d [A-Z][a-z]{2} \d{4} [\d:]{8} GMT', text))


class _Fetch:
    """One file on its way, over as many attempts as it takes."""

    def __init__(self, url: str, target: Path, progress: Progress) -> None:
        self.url, self.target, self._progress = url, target, progress
        self._partial = _Partial.left_by_an_earlier_call(target)
        self._opener = urllib.request.build_opener(_Redirects())

    def run(self, has_digest: bool) -> _Partial:
        """Fetches until the file is whole; gives up after some attempts in a row that bring nothing new."""
        failures = 0
        try:
            while True:
                before = self._have()
                try:
                    return self._attempt(has_digest)
                except _TryAgain as error:
                    brought = self._have() > before
                    failures = 1 if brought else failures + 1
                    if failures >= _ATTEMPTS:
                        raise OSError(
                            f"{self.url}: {_ATTEMPTS} attempts failed ({error}); call again to go on from there"
                        ) from None
                    if not brought:
                        time.sleep(error.pause or min(_PAUSE * 2 ** (failures - 1), _LONGEST_PAUSE))
        except BaseException:
            self._leave()
            raise

    def _have(self) -> int:
        return self._partial.size() if self._partial else 0

    def _leave(self) -> None:
        """Keeps what a later call can go on from."""
        if self._partial is not None and self._partial.validator and self._have():
            self._partial.close()
        else:
            self._forget()

    def _forget(self) -> None:
        if self._partial is not None:
            self._partial.remove()
        self._partial = None

    def _attempt(self, has_digest: bool) -> _Partial:
        have = self._have()
        headers = {"Accept-Encoding": "identity"}
        if have and self._partial and self._partial.validator:
            headers |= {"Range": f"bytes={have}-", "If-Range": self._partial.validator}
        with self._open(headers) as response:
            announced = response.headers
            if response.status == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return self._complete_already(have, announced)
            self._check_kind(response.status, announced)
            if response.status == http.client.PARTIAL_CONTENT:
                total = self._resumed_total(have, announced)
            else:
                total = self._start_over(response, has_digest)
            assert self._partial is not None
            self._receive(response, self._partial, total)
        return self._partial

    def _open(self, headers: dict[str, str]) -> Any:
        try:
            return self._opener.open(urllib.request.Request(self.url, headers=headers), timeout=_TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
                return error
            error.close()
            if error.code in _COME_BACK:
                raise _TryAgain(f"the server answers {error.code} {error.reason}", _pause_asked_for(error)) from None
            raise OSError(
                f"{self.url}: the server answers {error.code} {error.reason}: check --base_url and --neurons"
            ) from None
        except (http.client.InvalidURL, ValueError) as error:
            raise ValueError(f"{self.url}: not an address that can be fetched ({error})") from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionError | TimeoutError):
                raise _TryAgain(error.reason) from None
            raise OSError(f"{self.url}: cannot be reached ({error.reason}): check --base_url and the network") from None
        except _BROKEN as error:
            raise _TryAgain(error) from None

    def _check_kind(self, status: int, announced: Message) -> None:
        if status not in (http.client.OK, http.client.PARTIAL_CONTENT):
            raise OSError(f"{self.url}: the server answers {status} where it should send a file: check --base_url")
        encoding = announced.get("Content-Encoding", "identity").strip().lower()
        if encoding not in ("", "identity"):
            raise OSError(f"{self.url}: the server sends the file encoded ({encoding}), though it was asked not to")
        if announced.get_content_type() in ("text/html", "application/xhtml+xml"):
            raise OSError(f"{self.url}: {_NO_FILE}")

    def _resumed_total(self, have: int, announced: Message) -> int:
        """The file's size, where the answer goes on just where we stopped, in the same version."""
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", announced.get("Content-Range", "").strip())
        version = _validator(announced)
        if self._partial is None or not found or int(found[1]) != have or int(found[2]) + 1 != int(found[3]):
            self._forget()
            raise _TryAgain(f"asked to go on at byte {have}, the server sends {announced.get('Content-Range')!r}")
        if version is not None and version != self._partial.validator:
            self._forget()
            raise _TryAgain("the file changed on the server")
        return int(found[3])

    def _start_over(self, response: Any, has_digest: bool) -> int | None:
        """The file's size, or None where the server does not say it."""
        self._forget()
        total, validator = response.length, _validator(response.headers)
        if total is None and not has_digest and not _md5(validator):
            raise OSError(
                f"{self.url}: the server does not say how long the file is, nor its checksum: not to be relied on"
            )
        if total == 0:
            raise OSError(f"{self.url}: the server sends an empty file: check --base_url")
        self._partial = _Partial.new(self.target, validator)
        return total

    def _receive(self, response: Any, partial: _Partial, total: int | None) -> None:
        have = partial.size()
        self._progress(self.target.name, have, total)
        try:
            while block := response.read1(_BLOCK):  # read would wait for a whole block, and lose it where it breaks
                _write(partial, block)
                have += len(block)
                self._progress(self.target.name, have, total)
        except _BROKEN as error:
            raise _TryAgain(error) from None
        os.fsync(partial.file.fileno())
        if total is not None and have != total:
            raise _TryAgain(f"{have:,} of {total:,} bytes came")

    def _complete_already(self, have: int, announced: Message) -> _Partial:
        """The server has nothing beyond what is here: right if that is the whole file."""
        if self._partial is None or announced.get("Content-Range") != f"bytes */{have}":
            self._forget()
            raise ValueError(f"{self.url}: the partial file is longer than the server's: removed it; call again")
        return self._partial


class _TryAgain(Exception):  # noqa: N818
    """What another attempt may mend; `pause` is how long the server asks to wait, in seconds."""

    def __init__(self, reason: object, pause: float | None = None) -> None:
        super().__init__(reason)
        self.pause = pause


_BROKEN = (http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows to http and https alone, and never from https to http."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        scheme = urllib.parse.urlsplit(newurl).scheme
        if scheme not in ("http", "https") or (req.type == "https" and scheme == "http"):
            raise urllib.error.HTTPError(req.full_url, code, f"and leads to {newurl}, which is not safe", headers, fp)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _write(partial: _Partial, block: bytes) -> None:
    try:
        left = memoryview(block)
        while left:
            left = left[partial.file.write(left) :]
    except OSError as error:  # a full disk, which the operating system does not name
        raise OSError(error.errno, error.strerror, str(partial.path)) from None


def _pause_asked_for(error: urllib.error.HTTPError) -> float | None:
    asked = error.headers.get("Retry-After", "")
    return min(float(asked), _LONGEST_PAUSE) if asked.isdecimal() else None


def _validator(announced: Message) -> str | None:
    """What names the version of the file: a strong ETag, or else a date."""
    for text in (announced.get("ETag"), announced.get("Last-Modified")):
        if text and _is_validator(text) and len(urllib.parse.quote(text, safe="")) <= _LONGEST_VALIDATOR:
            return text
    return None


def _md5(validator: str | None) -> str | None:
    found = re.fullmatch(r'"([0-9a-f]{32})"', validator or "")  # of a multipart upload it is none
    return found[1] if found else None


def _check_digest(url: str, partial: _Partial, sha256: str | None) -> None:
    if sha256 is not None:
        algorithm, expected = "sha256", sha256.lower()
    elif md5 := _md5(partial.validator):
        algorithm, expected = "md5", md5
    else:
        return
    partial.file.seek(0)
    found = hashlib.file_digest(partial.file, algorithm).hexdigest()  # pyright: ignore[reportArgumentType]
    if found != expected:
        partial.remove()
        raise ValueError(f"{url}: the {algorithm} is {found}, expected {expected}: removed what arrived; call again")


def _check_content(url: str, partial: _Partial) -> None:
    partial.file.seek(0)
    head = partial.file.read(256)
    is_page = head.lstrip().lower().startswith((b"<!doctype html", b"<html", b"<?xml"))
    if is_page or (urllib.parse.urlsplit(url).path.endswith(".gz") and not head.startswith(b"\x1f\x8b")):
        partial.remove()
        raise OSError(
            f"{url}: {_NO_FILE if is_page else 'what the server sends is not in gzip form: check --base_url'}"
        )
