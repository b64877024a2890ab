"""The official files of the challenge: networks and inputs as TSV, plain or packed. All indices count from 1."""

import contextlib
import gzip
import io
import os
import shutil
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax._files import unpacked
from spdnn_jax._native import usable_cores
from spdnn_jax.graph_challenge import radixnet
from spdnn_jax.graph_challenge.inputs import ALL
from spdnn_jax.graph_challenge.networks import ACTIVATION, EDGES_PER_NEURON
from spdnn_jax.io.tables import Source, Table, read_tables
from spdnn_jax.network import SparseLayer, save_layers

ARCHIVE = ".tar.gz"
"""How the name of a packed network ends."""

_CURE = "fetch the file again (spdnn download)"
_PIECE = 1 << 20  # bytes read at a time where none are kept
_TAR_HEADERS = 1 << 20  # bytes of headers before a member, at most
_LONGEST_LINE = 64  # bytes of a line of a packed layer, on average


# --- networks ---------------------------------------------------------------------------------------------------------


def layers(directory: str | os.PathLike[str], neurons: int, count: int) -> Iterator[SparseLayer]:
    """Reads an official network, layer by layer, a few layers ahead on all cores.

    Args:
        directory: Holds the folder ``neuron<N>`` with files ``n<N>-l<k>.tsv``, or ``neuron<N>.tar.gz``; that folder
            or that file itself will do too. A packed folder is unpacked to a temporary file first.
        neurons: Width N.
        count: Number of layers, from the first on.

    Returns:
        An iterator of layers, with the official bias of the width.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is malformed; the message names file, line and cure.
    """
    with contextlib.ExitStack() as stack:
        sources = _find_network(Path(directory), neurons, count, stack)
        workers = usable_cores()
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        ahead: deque[Any] = deque()
        for source in sources:
            ahead.append(pool.submit(_read_layer, source, neurons, threads=1))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _find_network(directory: Path, neurons: int, count: int, stack: contextlib.ExitStack) -> list[Source]:
    name = f"neuron{neurons}"
    wanted = [f"n{neurons}-l{number}.tsv" for number in range(1, count + 1)]
    packed = directory if directory.name.endswith(ARCHIVE) else directory / f"{name}{ARCHIVE}"
    for folder in (directory / name, directory):
        if (folder / wanted[0]).is_file():
            found = {file: Source.of(folder / file) for file in wanted if (folder / file).is_file()}
            shown = str(folder)
            break
    else:
        if not packed.is_file():
            raise FileNotFoundError(
                f"{directory} holds neither {name}/{wanted[0]} nor {packed.name}: point --dataset_dir at the official "
                "files, or fetch them with spdnn download"
            )
        spool = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        found = _unpack(packed, neurons, set(wanted), spool)
        shown = f"{packed}: {name}"
    missing = next((file for file in wanted if file not in found), None)
    if missing is not None:
        raise FileNotFoundError(
            f"{shown}/{missing} is missing: {count} layers were asked for; {_CURE}, or lower --layers"
        )
    return [found[file] for file in wanted]


def _unpack(packed: Path, neurons: int, wanted: set[str], spool: Any) -> dict[str, Source]:
    """Copies the wanted members into one file, which has no name: nothing is left behind, whatever ends the program."""
    found: dict[str, Source] = {}
    longest = neurons * EDGES_PER_NEURON * _LONGEST_LINE
    try:
        with unpacked(packed) as stream:
            metered = _Metered(stream)
            with tarfile.open(fileobj=metered, mode="r|") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
                for member in archive:
                    if member.name.startswith("/"):
                        raise tarfile.AbsolutePathError(member)
                    tarfile.data_filter(member, tempfile.gettempdir())  # raises where a member points outside
                    metered.left = max(member.size, 0) + _TAR_HEADERS
                    folder, _, file = member.name.removeprefix("./").partition("/")
                    if not (member.isreg() and folder == f"neuron{neurons}" and file in wanted):
                        continue
                    if member.size > longest:
                        raise tarfile.ReadError(
                            f"{member.name} has {member.size:,} bytes, more than such a layer can have"
                        )
                    begin = spool.tell()
                    shutil.copyfileobj(archive.extractfile(member), spool)  # pyright: ignore[reportArgumentType]
                    found[file] = _member(spool, begin, member.size, f"{packed}: {folder}/{file}")
            while stream.read(_PIECE):
                pass  # to the end, where the checksum stands
    except tarfile.FilterError as error:
        raise ValueError(f"{packed}: refused, for a member points outside its folder ({error})") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError, OverflowError) as error:
        raise ValueError(f"{packed}: the archive is corrupt or cut short ({error}): {_CURE}") from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, error.filename or tempfile.gettempdir()) from None
    spool.flush()
    return found


def _member(spool: Any, begin: int, size: int, name: str) -> Source:
    return Source(name, lambda: _Stretch(spool.fileno(), begin, begin + size), size)


class _Metered:
    """A stream that ends where a tar archive's header asks for more than any has: tarfile would take it into memory."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.left = _TAR_HEADERS

    def read(self, size: int) -> bytes:
        block = self._stream.read(size)
        self.left -= len(block)
        if self.left < 0:
            raise tarfile.ReadError("a header of more than a MiB")
        return block


class _Stretch(io.RawIOBase):
    """A stretch of an open file, with a position of its own: threads read many of one file."""

    def __init__(self, descriptor: int, begin: int, end: int) -> None:
        self._descriptor, self._next, self._end = descriptor, begin, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: self._end - self._next]
        count = os.preadv(self._descriptor, [room], self._next) if len(room) else 0
        self._next += count
        return count


def read_layer(path: Path, neurons: int, name: str | None = None, threads: int | None = None) -> SparseLayer:
    """Reads one layer of an official network.

    Args:
        path: A TSV file of (input neuron, output neuron, weight), counted from 1.
        neurons: Width N.
        name: What to call the file in messages; by default, its path.
        threads: Threads to read with; by default, the cores this process may use.

    Returns:
        The layer, with one shared value where all weights are equal.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is malformed; the message names line and cure.
    """
    source = Source.of(path)
    return _read_layer(replace(source, name=name or source.name), neurons, threads or usable_cores())


def _read_layer(source: Source, neurons: int, threads: int) -> SparseLayer:
    name = source.name
    tables: list[Table] = []
    for table in read_tables(source, _CURE, threads):
        tables.append(table)
        if sum(len(rows) for rows, _, _ in tables) > neurons * EDGES_PER_NEURON:
            raise ValueError(
                f"{name}: more than the {neurons * EDGES_PER_NEURON:,} edges that an official network of {neurons} "
                f"neurons has: of another network; check --neurons, or {_CURE}"
            )
    inputs, outputs, values = tables[0] if len(tables) == 1 else map(np.concatenate, zip(*tables, strict=True))
    for column in (inputs, outputs):
        _check_range(name, column, neurons, "neuron")
    if not np.isfinite(values).all():
        line = int(np.argmin(np.isfinite(values))) + 1
        raise ValueError(f"{name}, line {line}: the weight {values[line - 1]} is not a finite number; {_CURE}")
    keys = outputs.astype(np.int64) * neurons + inputs
    if (keys[1:] <= keys[:-1]).any():  # the official files are in order
        order = np.argsort(keys, kind="stable")
        keys, inputs, outputs, values = keys[order], inputs[order], outputs[order], values[order]
        if (keys[1:] == keys[:-1]).any():
            line = int(order[1 + int(np.argmax(keys[1:] == keys[:-1]))]) + 1
            raise ValueError(f"{name}, line {line}: the edge stands in the file twice; {_CURE}")
    _check_edges(name, outputs, neurons)
    if (values == values[0]).all():
        values = values[0]
    indptr = np.arange(neurons + 1, dtype=np.int64) * EDGES_PER_NEURON
    return SparseLayer(indptr, inputs - 1, values, np.asarray(radixnet.bias(neurons), np.float32), neurons)


def _check_edges(name: str, outputs: np.ndarray, neurons: int) -> None:
    if np.array_equal(outputs, np.repeat(np.arange(1, neurons + 1, dtype=outputs.dtype), EDGES_PER_NEURON)):
        return
    edges = np.bincount(outputs, minlength=neurons + 1)[1:]
    short = int(np.argmax(edges != EDGES_PER_NEURON))
    raise ValueError(
        f"{name}, line {outputs.size}: output neuron {short + 1} has {edges[short]} edges at the end of the file, "
        f"where an official network of {neurons} neurons has {EDGES_PER_NEURON}: the file is cut short or of "
        f"another network; {_CURE}"
    )


def convert(
    directory: str | os.PathLike[str],
    neurons: int,
    count: int,
    output: str | os.PathLike[str],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Turns an official network into one compact file, which `NetworkFile` reads at disk speed.

    Args:
        directory: As for `layers`.
        neurons: Width N.
        count: Number of layers.
        output: The file to write, whole or not at all.
        progress: Called after each layer with the number of layers done.

    Raises:
        OSError: A file cannot be read or written.
        ValueError: A file is malformed.
    """

    def counted() -> Iterator[SparseLayer]:
        for number, layer in enumerate(layers(directory, neurons, count), start=1):
            yield layer
            if progress is not None:
                progress(number)

    save_layers(output, counted(), count, ACTIVATION)


# --- inputs -----------------------------------------------------------------------------------------------------------


def find_features(directory: str | os.PathLike[str], neurons: int) -> Path:
    """The file of the official inputs in a folder.

    Raises:
        FileNotFoundError: There is none.
    """
    for name in (f"sparse-images-{neurons}.tsv", f"sparse-images-{neurons}.tsv.gz"):
        path = Path(directory, name)
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"{directory} holds no sparse-images-{neurons}.tsv[.gz]: fetch it with spdnn download, or choose other --inputs"
    )


def features(directory: str | os.PathLike[str], neurons: int, count: int, share: slice = ALL) -> np.ndarray:
    """Reads the official inputs, ``sparse-images-<N>.tsv`` or ``.tsv.gz``.

    Args:
        directory: Holds the file.
        neurons: Width N.
        count: Number of features, from the first on.
        share: Which of these features to keep; the others take no memory.

    Returns:
        uint8 (features kept, neurons) of 0 and 1.

    Raises:
        OSError: The file is missing or cannot be read.
        ValueError: The file is malformed; the message names line and cure.
    """
    if count < 1:
        raise ValueError(f"at least one feature is needed, got {count}")
    path = find_features(directory, neurons)
    features_kept = range(count)[share]
    place = np.full(count + 1, -1)  # in the result, by the feature's number
    place[np.asarray(features_kept, np.int64) + 1] = np.arange(len(features_kept))
    result = np.zeros((len(features_kept), neurons), np.uint8)
    first_line, last_feature = 1, 0
    for rows, pixels, values in read_tables(Source.of(path), _CURE):
        _check_range(str(path), rows, np.iinfo(np.int32).max, "feature", first_line)
        _check_range(str(path), pixels, neurons, "pixel", first_line)
        binary = (values == 0) | (values == 1)
        if not binary.all():
            line = int(np.argmin(binary))
            raise ValueError(f"{path}, line {first_line + line}: a pixel is 0 or 1, found {values[line]}; {_CURE}")
        kept = (rows <= count) & (values != 0)
        kept[kept] = place[rows[kept]] >= 0
        result[place[rows[kept]], pixels[kept] - 1] = 1
        first_line += rows.size
        last_feature = max(last_feature, int(rows.max(initial=0)))
    if last_feature < count:
        raise ValueError(
            f"{path}, line {first_line - 1}: the last feature is {last_feature}, {count} were asked for: "
            f"lower --features, or {_CURE}"
        )
    return result


# --- common -----------------------------------------------------------------------------------------------------------


def _check_range(name: str, column: np.ndarray, limit: int, what: str, first_line: int = 1) -> None:
    wrong = (column < 1) | (column > limit)
    if not wrong.any():
        return
    position = int(np.argmax(wrong))
    value = column[position]
    why = (
        "indices count from 1; a file that counts from 0 has to be shifted"
        if value == 0
        else f"a network of {limit} neurons was asked for; check --neurons, or {_CURE}"
    )
    raise ValueError(f"{name}, line {first_line + position}: {what} {value} does not exist: {why}")
