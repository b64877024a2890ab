"""Loads the compiled back ends and registers their handlers with XLA; the only file that does."""

import ctypes
import functools
import importlib.metadata
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

try:
    import spdnn_jax._core as core
except ImportError as error:  # a source tree without a build, or a build for another Python
    raise ImportError(
        f"the native core of spdnn_jax could not be loaded ({error}). Install the package with a C++17 compiler at "
        "hand: pip install . (see BUILD.md)"
    ) from error

NETWORK_TARGET = "spdnn_network"
LAYER_TARGET = "spdnn_layer"
SAMPLED_TARGET = "spdnn_sampled"
PERMUTED_TARGET = "spdnn_permuted"  # on the CPU alone
CHAIN_TARGET = "spdnn_chain"
CHAIN_DERIVATIVE_TARGET = "spdnn_chain_derivative"

CUDA_LIBRARY = Path(str(core.__file__)).with_name("_cuda.so")
"""The CUDA back end, where it was built: beside the core, which an editable install keeps out of the source tree."""


def ffi_versions() -> tuple[tuple[int, int], tuple[int, int]]:
    """Versions of XLA's FFI interface: that this package was built for, and that the installed jaxlib speaks."""
    return core.ffi_api_version(), _jaxlib_ffi_version()


def _jaxlib_ffi_version() -> tuple[int, int]:
    """The version of the FFI interface that the installed jaxlib speaks, read from the header it ships."""
    header = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h").read_text(encoding="utf-8")
    major, minor = (
        int(re.search(rf"#define\s+XLA_FFI_API_{part}\s+(\d+)", header)[1])  # pyright: ignore[reportOptionalSubscript]
        for part in ("MAJOR", "MINOR")
    )
    return major, minor


def _check_version() -> None:
    """Raises ImportError where this package was built against a newer jaxlib than the installed one.

    A handler runs on the jaxlib that it was built against and on newer ones. On an older one XLA would refuse it much
    later, with "Unable to initialize backend".
    """
    built, installed = ffi_versions()
    if built[0] != installed[0] or built[1] > installed[1]:
        raise ImportError(
            f"spdnn_jax was built for version {built[0]}.{built[1]} of XLA's FFI interface, but jaxlib "
            f"{importlib.metadata.version('jaxlib')} speaks {installed[0]}.{installed[1]}: upgrade jaxlib, or build "
            "spdnn_jax from source beside it (pip install --no-build-isolation .)"
        )


def usable_cores() -> int:
    """Cores that this process may use: how many threads native code is given."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cuda_unavailable_reason() -> str | None:
    """Why the CUDA back end cannot be used in this process, or None where it can."""
    if not CUDA_LIBRARY.exists():
        return (
            "spdnn_jax was installed without CUDA: reinstall it with SPDNN_CUDA=ON where nvcc is found (see BUILD.md)"
        )
    if not any(device.platform == "gpu" for device in _gpu_devices()):
        return "JAX sees no NVIDIA GPU: check nvidia-smi, the driver, and pip install 'spdnn_jax[cuda13]'"
    return None


def _gpu_devices() -> list[Any]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


def _register_cpu() -> None:
    for name, handler in core.handlers().items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")


def _register_cuda() -> None:
    """Registers the CUDA handlers, which load without a driver, so that programs can be lowered for a GPU anywhere."""
    if not has_cuda_library():
        return
    symbols = {
        NETWORK_TARGET: "SpdnnNetworkCuda",
        LAYER_TARGET: "SpdnnLayerCuda",
        SAMPLED_TARGET: "SpdnnSampledCuda",
        CHAIN_TARGET: "SpdnnChainCuda",
        CHAIN_DERIVATIVE_TARGET: "SpdnnChainDerivativeCuda",
    }
    for name, symbol in symbols.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(_cuda(), symbol)), platform="CUDA")


@functools.cache
def _cuda() -> ctypes.CDLL:
    library = ctypes.CDLL(str(CUDA_LIBRARY))
    library.spdnn_cuda_workspace_bytes.restype = ctypes.c_int64
    library.spdnn_cuda_workspace_bytes.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    for of_layer in (library.spdnn_cuda_product_workspace_bytes, library.spdnn_cuda_sampled_workspace_bytes):
        of_layer.restype = ctypes.c_int64
        of_layer.argtypes = [ctypes.c_int64] * 4
    library.spdnn_cuda_chain_workspace_bytes.restype = ctypes.c_int64
    library.spdnn_cuda_chain_workspace_bytes.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 3]
    return library


def has_cuda_library() -> bool:
    """Whether the CUDA back end was built; it may still find no GPU."""
    return CUDA_LIBRARY.exists()


def cuda_workspace_bytes(records: np.ndarray, features: int) -> int:
    """Bytes of device memory that the CUDA back end needs beside its arguments and results.

    Args:
        records: int64, the records of a plan.
        features: Number of features in a call.

    Raises:
        ValueError: The records do not fit together.
    """
    return _size_by_records(_cuda().spdnn_cuda_workspace_bytes(records.ctypes.data, records.size, features))


def cuda_product_workspace_bytes(features: int, inputs: int, outputs: int, edges: int) -> int:
    """As `cuda_workspace_bytes`, of a layer in compressed rows."""
    return _cuda().spdnn_cuda_product_workspace_bytes(features, inputs, outputs, edges)


def cuda_sampled_workspace_bytes(features: int, inputs: int, outputs: int, edges: int) -> int:
    """As `cuda_workspace_bytes`, of the derivative in the values of a layer."""
    return _cuda().spdnn_cuda_sampled_workspace_bytes(features, inputs, outputs, edges)


def cuda_chain_workspace_bytes(records: np.ndarray, words: int, features: int) -> int:
    """As `cuda_workspace_bytes`, of a plan's rows: their records, and how many words they have."""
    size = _cuda().spdnn_cuda_chain_workspace_bytes(records.ctypes.data, records.size, words, features)
    return _size_by_records(size)


def _size_by_records(size: int) -> int:
    if size < 0:
        raise ValueError("the plan is damaged: its records do not fit together: build it again")
    return size


_check_version()
_register_cpu()
_register_cuda()
