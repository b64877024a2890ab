"""What a file is, as it claims: by its name or, where that says nothing, by its first bytes."""

from pathlib import Path
from typing import Literal

from spdnn_jax._extras import require
from spdnn_jax._files import unpacked
from spdnn_jax.io.files import reading, unpacked_path

Kind = Literal["npz", "mtx", "text", "state dict", "network"]

_PICKLES = (".pt", ".pth", ".pkl", ".bin")


def kind_of(path: Path) -> Kind:
    """What kind of network or matrix a file claims to hold, gzipped or not.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is of a kind that is not read, or no safetensors file where it claims to be one.
    """
    suffix = Path(path.stem if path.suffix == ".gz" else path.name).suffix.lower()
    if suffix in _PICKLES:
        raise ValueError(f"{path}: pickles are not read: write the state dict with safetensors.torch.save_file")
    with unpacked(path) as file:
        head = file.read(9)
    if suffix == ".safetensors" or (suffix not in (".npz", ".mtx") and head[8:] == b"{"):
        return _kind_of_safetensors(path)
    if suffix == ".npz" or (suffix != ".mtx" and head[:2] == b"PK"):
        return "npz"
    return "mtx" if suffix == ".mtx" or head[:2] == b"%%" else "text"


def _kind_of_safetensors(path: Path) -> Kind:
    safetensors = require("safetensors", extra="data", purpose="reading a safetensors file")
    cure = "write it with SparseNetwork.save or safetensors.torch.save_file, or fetch it again"
    with (
        unpacked_path(path) as plain,
        reading(path, "a safetensors file", cure, safetensors.SafetensorError),
        safetensors.safe_open(plain, framework="numpy") as file,
    ):
        form = (file.metadata() or {}).get("format", "")
    if form.startswith("spdnn_jax plan"):
        raise ValueError(f"{path}: is a plan, not a network: read it with Plan.load")
    return "network" if form.startswith("spdnn_jax") else "state dict"
