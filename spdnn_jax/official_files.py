"""The official files of the challenge: networks and inputs as TSV, plain or packed. All indices count from 1."""

import contextlib
import gzip
import os
import re
import tarfile
import tempfile
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax import radixnet
from spdnn_jax._extras import require
from spdnn_jax.challenge import CAP, EDGES_PER_NEURON
from spdnn_jax.features import ALL
from spdnn_jax.network import SparseLayer, save_layers

_CURE = "fetch the file again (spdnn download)"
_COLUMNS = ("int32", "int32", "float32")


# --- networks ---------------------------------------------------------------------------------------------------------


def layers(directory: str | os.PathLike[str], neurons: int, count: int) -> Iterator[SparseLayer]:
    """Reads an official network, layer by layer, a few layers ahead on all cores.

    Args:
        directory: Holds the folder ``neuron<N>`` with files ``n<N>-l<k>.tsv``, or ``neuron<N>.tar.gz``; the folder
            itself will do too. A packed folder is unpacked to a temporary folder first.
        neurons: Width N.
        count: Number of layers, from the first on.

    Returns:
        An iterator of layers, with the official bias of the width.

    Raises:
        OSError: A file is missing or cannot be read.
        ValueError: A file is malformed; the message names file, line and cure.
    """
    with contextlib.ExitStack() as stack:
        folder, shown = _find_network(Path(directory), neurons, count, stack)
        names = [f"n{neurons}-l{number}.tsv" for number in range(1, count + 1)]
        for name in names:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"{shown}/{name} is missing: {count} layers were asked for; {_CURE}, or lower --layers"
                )
        workers = os.cpu_count() or 1
        pool = stack.enter_context(ThreadPoolExecutor(workers))
        ahead: deque[Any] = deque()
        for name in names:
            ahead.append(pool.submit(read_layer, folder / name, neurons, f"{shown}/{name}"))
            if len(ahead) > workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()


def _find_network(directory: Path, neurons: int, count: int, stack: contextlib.ExitStack) -> tuple[Path, str]:
    """The folder of the layers and its name for messages: an archive's own, not that of its temporary folder."""
    name = f"neuron{neurons}"
    for folder in (directory / name, directory):
        if (folder / f"n{neurons}-l1.tsv").is_file():
            return folder, str(folder)
    packed = directory / f"{name}.tar.gz"
    if packed.is_file():
        target = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="spdnn-")))
        _unpack(packed, neurons, count, target)
        return target / name, f"{packed}: {name}"
    raise FileNotFoundError(
        f"{directory} holds neither {name}/n{neurons}-l1.tsv nor {packed.name}: point --dataset_dir at the official "
        "files, or fetch them with spdnn download"
    )


def _unpack(packed: Path, neurons: int, count: int, target: Path) -> None:
    wanted = re.compile(rf"neuron{neurons}/n{neurons}-l(\d+)\.tsv")
    try:
        with gzip.open(packed) as stream, tarfile.open(fileobj=stream, mode="r|") as archive:
            for member in archive:
                if member.name.startswith("/"):
                    raise tarfile.AbsolutePathError(member)
                tarfile.data_filter(member, str(target))  # raises where a member points outside
                found = wanted.fullmatch(member.name.removeprefix("./"))
                if found and member.isfile() and int(found[1]) <= count:
                    archive.extract(member, target, filter="data")
            while stream.read(1 << 20):
                pass  # to the end, where the checksum stands
    except tarfile.FilterError as error:
        raise ValueError(f"{packed}: refused, for a member points outside its folder ({error})") from None
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{packed}: the archive is corrupt or cut short ({error}): {_CURE}") from None


def read_layer(path: Path, neurons: int, name: str | None = None) -> SparseLayer:
    """Reads one layer of an official network.

    Args:
        path: A TSV file of (input neuron, output neuron, weight), counted from 1.
        neurons: Width N.
        name: What to call the file in messages; by default, its path.

    Returns:
        The layer, with one shared value where all weights are equal.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is malformed; the message names line and cure.
    """
    name = name or str(path)
    inputs, outputs, values = _read_table(path, name)
    for column in (inputs, outputs):
        _check_range(name, column, neurons, "neuron")
    if not np.isfinite(values).all():
        line = int(np.argmin(np.isfinite(values))) + 1
        raise ValueError(f"{name}, line {line}: the weight {values[line - 1]} is not a finite number; {_CURE}")
    edges = np.bincount(outputs, minlength=neurons + 1)[1:]
    if (edges != EDGES_PER_NEURON).any():
        short = int(np.argmax(edges != EDGES_PER_NEURON))
        raise ValueError(
            f"{name}, line {inputs.size}: output neuron {short + 1} has {edges[short]} edges at the end of the file, "
            f"where an official network of {neurons} neurons has {EDGES_PER_NEURON}: the file is cut short or of "
            f"another network; {_CURE}"
        )
    keys = (outputs.astype(np.int64) - 1) * neurons + (inputs - 1)
    if (keys[1:] <= keys[:-1]).any():  # the official files are in order
        order = np.argsort(keys, kind="stable")
        keys, values = keys[order], values[order]
        if (keys[1:] == keys[:-1]).any():
            line = int(order[1 + int(np.argmax(keys[1:] == keys[:-1]))]) + 1
            raise ValueError(f"{name}, line {line}: the edge stands in the file twice; {_CURE}")
    if (values == values[0]).all():
        values = values[0]
    indptr = np.concatenate([[0], np.cumsum(edges)])
    bias = np.asarray(radixnet.bias(neurons), np.float32)
    return SparseLayer(indptr, (keys % neurons).astype(np.int32), values, bias, neurons)


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

    save_layers(output, counted(), count, CAP)


# --- inputs -----------------------------------------------------------------------------------------------------------


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
    for name in (f"sparse-images-{neurons}.tsv", f"sparse-images-{neurons}.tsv.gz"):
        path = Path(directory) / name
        if path.is_file():
            break
    else:
        raise FileNotFoundError(
            f"{directory} holds no sparse-images-{neurons}.tsv[.gz]: fetch it with spdnn download, "
            "or choose other --inputs"
        )
    features_kept = range(count)[share]
    place = np.full(count + 1, -1)  # in the result, by the feature's number
    place[np.asarray(features_kept, np.int64) + 1] = np.arange(len(features_kept))
    result = np.zeros((len(features_kept), neurons), np.uint8)
    first_line, last_feature = 1, 0
    for rows, pixels, values in _read_tables(path, str(path)):
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


# --- TSV --------------------------------------------------------------------------------------------------------------


def _read_table(path: Path, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batches = list(_read_tables(path, name, threads=False))
    first, second, third = (np.concatenate(columns) for columns in zip(*batches, strict=True))
    return first, second, third


def _read_tables(path: Path, name: str, threads: bool = True) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Batches of rows, so that memory stays bounded; raises ValueError with the line of what is malformed."""
    csv = require("pyarrow.csv", extra="data", purpose="reading TSV files")
    arrow = require("pyarrow", extra="data", purpose="reading TSV files")
    names = [str(k) for k in range(len(_COLUMNS))]
    types = dict(zip(names, (getattr(arrow, name)() for name in _COLUMNS), strict=True))
    lines = 0
    try:
        reader = csv.open_csv(
            os.fspath(path),
            read_options=csv.ReadOptions(column_names=names, use_threads=threads, block_size=1 << 24),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[], strings_can_be_null=False),
        )
        for batch in reader:
            lines += batch.num_rows
            yield tuple(column.to_numpy(zero_copy_only=False) for column in batch.columns)
    except arrow.ArrowInvalid as error:
        if not _is_empty(path):
            raise ValueError(_describe(path, name, str(error))) from None
    except OSError as error:
        if path.suffix != ".gz" or isinstance(error, FileNotFoundError | PermissionError):
            raise
        raise ValueError(f"{name}: the gzip stream is corrupt or cut short ({error}): {_CURE}") from None
    if not lines:
        raise ValueError(f"{name}: the file is empty: {_CURE}")
    if _ends_inside_line(path):
        raise ValueError(f"{name}, line {lines}: the line has no end: the file is cut short; {_CURE}")


def _ends_inside_line(path: Path) -> bool:
    """Whether a plain file is cut inside its last line, where a shortened number may still read as one."""
    if path.suffix == ".gz":
        return False  # a cut gzip stream betrays itself
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def _is_empty(path: Path) -> bool:
    with _open_text(path) as lines:
        return not lines.read(1)


def _open_text(path: Path) -> Any:
    return (
        gzip.open(path, "rt", errors="replace")
        if path.suffix == ".gz"
        else path.open(encoding="utf-8", errors="replace")
    )


def _describe(path: Path, name: str, reason: str) -> str:
    """Finds the first malformed line, the slow way: it is looked for only when there is one."""
    try:
        with _open_text(path) as lines:
            for number, line in enumerate(lines, start=1):
                fields = line.rstrip("\r\n").split("\t")
                try:
                    if len(fields) != len(_COLUMNS) or "_" in line:  # Python reads 1_000 as a number, files do not
                        raise ValueError
                    _ = np.int32(fields[0]), np.int32(fields[1]), np.float32(fields[2])
                except (ValueError, OverflowError):
                    return (
                        f"{name}, line {number}: expected two whole numbers and a number with tabs between, found "
                        f"{line.rstrip()[:60]!r}; {_CURE}"
                    )
    except (EOFError, OSError, zlib.error) as error:
        return f"{name}: the gzip stream is corrupt or cut short ({error}): {_CURE}"
    return f"{name}: {reason.splitlines()[0]}; {_CURE}"


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
