"""State dicts of PyTorch in safetensors files: dense, compressed (CSR) or masked weights, and biases beside them."""

import contextlib
import dataclasses
import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax import checks
from spdnn_jax._extras import require
from spdnn_jax.io.files import in_natural_order, reading, unpacked_path
from spdnn_jax.io.matrices import Matrix

_EVERY_WEIGHT = "*weight"
_CSR = (".crow_indices", ".col_indices", ".values")
_PARTS = (*_CSR, ".shape", "_orig", "_mask")
_SHOWN = 8  # names of tensors that a message shows
_CURE = "write it with safetensors.torch.save_file, or fetch it again"


def read_state_dict(paths: Sequence[Path], names: str | Sequence[str] | None, transpose: bool) -> list[Matrix]:
    """Reads the layers of a network from a state dict; `read_network` says in which forms they may stand.

    Args:
        paths: The file, or the files that the state dict is split into.
        names: Which tensors are matrices, as for `read_network`.
        transpose: Whether the matrices have shape (outputs, inputs), as PyTorch's do.

    Returns:
        The layers in order, each with its bias, or 0.

    Raises:
        OSError: A file cannot be read.
        ValueError: A file is malformed, a name matches nothing, or the file holds what is no layer.
    """
    with _opened(paths) as tensors:
        shown = ", ".join(str(path) for path in paths)
        roots = in_natural_order({_root(name) for name in tensors})
        patterns = [names or _EVERY_WEIGHT] if names is None or isinstance(names, str) else names
        chosen: list[str] = []
        for pattern in patterns:
            found = [root for root in roots if fnmatch.fnmatchcase(root, pattern)]
            if not found:
                raise ValueError(
                    f"{shown}: no tensor is called {pattern}: name the layers' matrices in order, of {_list(roots)}"
                )
            chosen += found
        biases = {root: _bias_of(root) for root in chosen}
        other = sorted(set(roots) - {*chosen, *biases.values()})
        if names is None and other:
            raise ValueError(
                f"{shown}: holds what is no weight or bias of a sparse layer, {_list(other)}: fold it into the layers, "
                "or name the layers' matrices in order"
            )
        return [_read_layer(f"{shown}: {root}", tensors, root, bias, transpose) for root, bias in biases.items()]


@contextlib.contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[Mapping[str, Any]]:
    """Which file holds a tensor, by its name."""
    safetensors = require("safetensors", extra="data", purpose="reading a state dict")
    holders: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        for path in paths:
            plain = stack.enter_context(unpacked_path(path))
            with reading(path, "a safetensors file", _CURE, safetensors.SafetensorError):
                file = stack.enter_context(safetensors.safe_open(plain, framework="numpy"))
            twice = sorted(holders.keys() & file.keys())
            if twice:
                raise ValueError(f"{path}: {twice[0]} stands in another of the files, too: give each file once")
            holders |= dict.fromkeys(file.keys(), file)
        yield holders


def _root(name: str) -> str:
    """The matrix or bias that a tensor is, or is a part of."""
    return next((name.removesuffix(part) for part in _PARTS if name.endswith(part)), name)


def _bias_of(name: str) -> str:
    head, dot, _ = name.rpartition(".")
    return f"{head}{dot}bias"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")


def _read_layer(shown: str, tensors: Mapping[str, Any], name: str, bias: str, transpose: bool) -> Matrix:
    safetensors = require("safetensors", extra="data", purpose="reading a state dict")

    def tensor(name: str) -> np.ndarray:
        if name not in tensors:
            raise ValueError(f"there is no tensor {name}")
        array = tensors[name].get_tensor(name)
        short = array.dtype.kind in "fV" and array.itemsize < 4  # float16 and bfloat16, which SciPy does not take
        return array.astype(np.float32) if short else array

    def whole(name: str) -> np.ndarray:
        """A dense tensor, or one that is masked."""
        return tensor(f"{name}_orig") * tensor(f"{name}_mask") if f"{name}_orig" in tensors else tensor(name)

    with reading(shown, "a layer", _CURE, safetensors.SafetensorError, TypeError):
        if name + _CSR[0] in tensors:
            shape = tensor(f"{name}.shape") if f"{name}.shape" in tensors else None
            starts, columns, values = (tensor(name + part) for part in _CSR)
            matrix = _compressed(shown, starts, columns, values, shape)
        else:
            matrix = Matrix.of(shown, whole(name))
        bias_values = whole(bias) if {bias, f"{bias}_orig"} & tensors.keys() else 0.0
    return (matrix.transposed() if transpose else matrix).with_bias(bias_values)


def _compressed(name: str, starts: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: Any) -> Matrix:
    scipy_sparse = require("scipy.sparse", extra="data", purpose="reading a compressed tensor")
    known = starts.size - 1, None if shape is None else int(shape[1])
    needed = int(columns.max(initial=-1)) + 1
    rows = scipy_sparse.csr_array((values, columns, starts), shape=(known[0], max(known[1] or 0, needed)))
    checks.scipy_indices(rows)
    return dataclasses.replace(Matrix.of(name, rows), shape=known)
