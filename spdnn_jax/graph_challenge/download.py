"""Fetches the official files of the challenge: with progress, resume, and checks of size and checksum."""

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

BASE_URL = "https://graphchallenge.s3.amazonaws.com/synthetic/sparsechallenge_2019"
"""The challenge's public bucket."""

Progress = Callable[[str, int, int | None], None]
"""Called with a file's name, the bytes that are there, and the bytes it will have (None: unknown)."""

_BLOCK = 1 << 20
_ATTEMPTS = 5
_TIMEOUT = 60  # seconds


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

    What arrives is kept in ``<target>.part`` until it is whole, and a later call goes on from there. The size is
    checked against the server's Content-Length, the content against `sha256` or, where the server gives one, the MD5
    in its ETag.

    Args:
        url: Where the file is.
        target: Where it goes. A file that is there already is left alone.
        sha256: The expected digest, in hexadecimal.
        progress: See `Progress`.

    Returns:
        The target.

    Raises:
        OSError: The server cannot be reached or does not have the file, or the target cannot be written.
        ValueError: Size or checksum are wrong; the partial file is removed.
    """
    target = Path(target)
    if target.exists():
        return target
    partial = target.with_name(target.name + ".part")
    etag = None
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            etag = _fetch(url, partial, lambda done, total: progress and progress(target.name, done, total))
            break
        except (http.client.HTTPException, ConnectionError, TimeoutError) as error:
            if attempt == _ATTEMPTS:
                raise OSError(
                    f"{url}: the connection broke {_ATTEMPTS} times ({error}); call again to go on from there"
                ) from None
    _check_digest(url, partial, sha256, etag)
    partial.replace(target)
    return target


def _fetch(url: str, partial: Path, progress: Callable[[int, int | None], object]) -> str | None:
    """Appends what is missing to the partial file; returns the ETag."""
    have = partial.stat().st_size if partial.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        response = urllib.request.urlopen(request, timeout=_TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE:
            return _complete_already(url, partial, have, error.headers.get("Content-Range"), error.headers.get("ETag"))
        raise OSError(
            f"{url}: the server answers {error.code} {error.reason}: check --base_url and --neurons"
        ) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, ConnectionError | TimeoutError):
            raise error.reason from None
        raise OSError(f"{url}: cannot be reached ({error.reason}): check --base_url and the network") from None
    with response:
        if response.status != http.client.PARTIAL_CONTENT:
            have = 0  # the server does not resume: from the start
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with partial.open("ab" if have else "wb") as file:
            progress(have, total)
            while block := response.read(_BLOCK):
                file.write(block)
                have += len(block)
                progress(have, total)
        if total is not None and have != total:
            raise http.client.IncompleteRead(b"", total - have)
        return response.headers.get("ETag")


def _complete_already(url: str, partial: Path, have: int, content_range: str | None, etag: str | None) -> str | None:
    """The server has nothing beyond what is here: right if that is the whole file."""
    if content_range != f"bytes */{have}":
        partial.unlink()
        raise ValueError(f"{url}: the partial file is longer than the server's: removed it; call again")
    return etag


def _check_digest(url: str, partial: Path, sha256: str | None, etag: str | None) -> None:
    md5 = re.fullmatch(r'"([0-9a-f]{32})"', etag or "")  # of a multipart upload it is none
    if sha256 is not None:
        algorithm, expected = "sha256", sha256.lower()
    elif md5:
        algorithm, expected = "md5", md5[1]
    else:
        return
    with partial.open("rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        partial.unlink()
        raise ValueError(f"{url}: the {algorithm} is {found}, expected {expected}: removed what arrived; call again")
