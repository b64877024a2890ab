"""`read_network`: anyone's network from files, in one of many forms."""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax.activation import Clip
from spdnn_jax.io.arrays import read_vector
from spdnn_jax.io.files import Paths, expand, unpacked_path
from spdnn_jax.io.kinds import kind_of
from spdnn_jax.io.matrices import Matrix, read_matrix
from spdnn_jax.io.state_dicts import read_state_dict
from spdnn_jax.network import Duplicates, SparseNetwork


def read_network(
    path: Paths,
    *,
    activation: Clip | Sequence[Clip] | None = None,
    biases: Any = None,
    transpose: bool | None = None,
    index_base: int = 1,
    names: str | Sequence[str] | None = None,
    inputs: int | None = None,
    outputs: int | None = None,
    duplicates: Duplicates = "refuse",
) -> SparseNetwork:
    """Reads a network from files.

    What a file is, is told by its name or, where that says nothing, by its first bytes; these alone tell whether it is
    gzipped. Read are

    - a network file, which `SparseNetwork.save` and ``spdnn convert`` write, and which holds all that a network is;
    - one file a layer: a sparse matrix of SciPy (``scipy.sparse.save_npz``), a Matrix Market file, or text: an edge a
      line, (input neuron, output neuron, weight) with tabs between, or all weights of a dense matrix, one a line,
      row by row;
    - a safetensors file with a state dict of PyTorch, or the files it is split into. A matrix is a dense tensor; or
      compressed, ``<name>.crow_indices``, ``.col_indices``, ``.values`` and, if the number of columns is to be known,
      ``.shape``; or pruned by ``torch.nn.utils.prune``, ``<name>_orig`` and ``<name>_mask``. The bias of ``fc.weight``
      is ``fc.bias``, or 0.

    Args:
        path: A file; several in the order of the layers; or a folder, which stands for its files in the order of the
            numbers in their names.
        activation: What follows every layer, or one a layer. May be left out for a network file, which knows it.
        biases: Where each layer has a file: a number for all; or one entry a layer, a number, a vector, or a file that
            `read_array` reads; or a folder, as in `path`. By default 0.
        transpose: Whether matrices stand as (outputs, inputs). By default as PyTorch has them: True for a state dict,
            False elsewhere.
        index_base: What neurons count from in text, 0 or 1.
        names: Which tensors of a state dict are matrices: a pattern, such as ``"encoder.*.weight"``, which takes them
            in the order of the numbers in their names; or names and patterns in the order of the layers. By default all
            whose name ends in ``weight``; then the file may hold nothing but them and their biases.
        inputs: Number of input neurons, where no file says it (text, compressed tensors without shape). By default the
            largest that an edge names; so it is between layers, where no matrix or vector of biases says it.
        outputs: Number of output neurons, likewise.
        duplicates: What to do where an edge is stored twice: ``"sum"`` the weights, or ``"refuse"``.

    Returns:
        The network.

    Raises:
        OSError: A file cannot be read.
        ImportError: An optional package is missing; the message names the extra that holds it.
        ValueError: A file is not what it claims to be, layers do not fit together, or an argument is missing; one line
            that names the file and what to do.
    """
    if index_base not in (0, 1):
        raise ValueError(f"index_base must be 0 or 1, got {index_base}")
    files = expand(path)
    kinds = {kind_of(file) for file in files}
    if kinds == {"network"} and len(files) == 1:
        if not (biases is transpose is names is None):
            raise ValueError(f"{files[0]}: a network file says all itself: leave out biases, transpose and names")
        network = _load(files[0])
        return network if activation is None else SparseNetwork(network.layers, activation)
    if activation is None:
        raise ValueError(
            f"{files[0]}: does not say what follows a layer: pass activation, such as Clip.relu() (--activation=relu)"
        )
    if kinds == {"state dict"}:
        if biases is not None:
            raise ValueError(f"{files[0]}: a state dict holds its own biases: leave out biases")
        matrices = read_state_dict(files, names, transpose is None or transpose)
    elif kinds & {"state dict", "network"}:
        raise ValueError(f"{files[0]}: network files and state dicts are no single layers: give one, or parts of one")
    else:
        of_layers = _read_biases(biases, len(files))
        sizes = [bias.size if bias.ndim else None for bias in of_layers]
        sizes[-1] = sizes[-1] or outputs
        matrices = [
            read_matrix(file, index_base=index_base, transpose=bool(transpose), outputs=size).with_bias(bias)
            for file, bias, size in zip(files, of_layers, sizes, strict=True)
        ]
    layers = [matrix.layer(duplicates) for matrix in _sized(matrices, inputs, outputs)]
    network = SparseNetwork(tuple(layers), activation)
    for what, found, wanted in (("inputs", network.inputs, inputs), ("outputs", network.outputs, outputs)):
        if wanted not in (None, found):
            raise ValueError(f"{files[0]}: the network has {found} {what}, {wanted} were asked for: drop {what}=")
    return network


def _load(path: Path) -> SparseNetwork:
    with unpacked_path(path) as plain:
        try:
            return SparseNetwork.load(plain)
        except ValueError as error:
            raise ValueError(str(error).replace(str(plain), str(path))) from None


def _read_biases(biases: Any, layers: int) -> list[np.ndarray]:
    """A number or a vector for each layer."""
    if biases is None or isinstance(biases, int | float) or getattr(biases, "ndim", None) == 0:
        return [np.asarray(biases or 0.0)] * layers
    listed = expand(biases) if isinstance(biases, str | os.PathLike) else list(biases)
    if len(listed) != layers:
        raise ValueError(f"{len(listed)} biases do not go with {layers} layers: give one a layer, or a number for all")
    return [read_vector(bias) if isinstance(bias, str | os.PathLike) else np.asarray(bias) for bias in listed]


def _sized(matrices: Sequence[Matrix], inputs: int | None, outputs: int | None) -> list[Matrix]:
    """Gives sizes that files do not say: those that were given, or their neighbours', or what the edges need."""
    widths = []
    for stage, given in enumerate([inputs, *[None] * (len(matrices) - 1), outputs]):
        before, after = matrices[max(stage - 1, 0) : stage], matrices[stage : stage + 1]
        known = [given, *(matrix.shape[1] for matrix in before), *(matrix.shape[0] for matrix in after)]
        least = [*(matrix.least[1] for matrix in before), *(matrix.least[0] for matrix in after)]
        widths.append(next((size for size in known if size is not None), max(least)))
    return [matrix.with_shape(*sizes) for matrix, sizes in zip(matrices, itertools.pairwise(widths), strict=True)]
