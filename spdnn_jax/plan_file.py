"""Plans on disk: each layer has a checksum of its own, so that a mapped plan is checked piece by piece when read."""

import itertools
import os
from collections.abc import Iterable

import numpy as np

from spdnn_jax._files import replacing
from spdnn_jax._tensors import TensorFile, TensorWriter, digest
from spdnn_jax.layout import PlanTable

_KIND = "spdnn_jax plan 1"
_WORDS = "words"


def _parts(table: PlanTable) -> list[tuple[str, slice]]:
    """Name and place of the records, of each layer, and of the output order: all of a plan's words."""
    starts = [0, *table.layers["first_word"].tolist(), int(table.header["slot_offset"]), int(table.header["words"])]
    layers = [f"layer {number}" for number in range(1, len(table.layers) + 1)]
    names = ["the table of layers", *layers, "the output order"]
    return [(name, slice(*place)) for name, place in zip(names, itertools.pairwise(starts), strict=True)]


def save(path: str | os.PathLike[str], words: np.ndarray, table: PlanTable) -> None:
    """Writes a plan.

    Args:
        path: The file.
        words: uint32 (words,), the plan.
        table: Its records.

    Raises:
        OSError: The file cannot be written; nothing is left behind.
    """
    with replacing(path) as file:
        writer = TensorWriter(file, _KIND, tensors=1)
        writer.add(_WORDS, words)
        writer.finish({}, [digest(words[place]) for _, place in _parts(table)])


class PlanFile:
    """A plan's file, mapped into memory, whose layers are checked as they are first used.

    Attributes:
        words: uint32 (words,), mapped.
        table: Its records, checked.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Opens the file and checks its records.

        Raises:
            OSError: The file cannot be read.
            ValueError: It holds no plan of this version, or its records are damaged.
        """
        self._file = TensorFile(path, _KIND, "plan file", "write it again with Plan.save")
        self.words = self._file.map(_WORDS, np.uint32)
        try:
            self.table = PlanTable(self.words)
            if self.words.size != self.table.header["words"]:
                raise ValueError(
                    f"the plan holds {self.words.size} words, its header says {self.table.header['words']}"
                )
            self._parts = _parts(self.table)
            if self._file.parts != len(self._parts):
                raise ValueError(f"the file has {self._file.parts} checksums where {len(self._parts)} are due")
        except ValueError as error:
            raise self.named(error) from None
        self._checked: set[int] = set()
        self._check_parts([0])

    def check(self, first: int, end: int) -> bool:
        """Checks layers first .. end (counted from 0), and with the last one the output order, if not done before.

        Returns:
            Whether some had not been checked before.

        Raises:
            ValueError: A layer is damaged; the message names it.
        """
        layers = len(self.table.layers)
        return self._check_parts([*range(first + 1, end + 1), *([layers + 1] if end == layers else [])])

    def _check_parts(self, parts: Iterable[int]) -> bool:
        new = [part for part in parts if part not in self._checked]
        for part in new:
            name, place = self._parts[part]
            self._file.check(part, name, self.words[place])
            self._checked.add(part)
        return bool(new)

    def named(self, error: ValueError) -> ValueError:
        """The error with the file's name before it."""
        return ValueError(f"{self._file.path}: {error}")
