"""The command `doctor`: what of this installation works, what is missing, and how to get it."""

import functools
import importlib.metadata
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import spdnn_jax
from spdnn_jax import _native
from spdnn_jax.command_line import report
from spdnn_jax.graph_challenge import input_cache, inputs, oracle, radixnet

_EXTRAS = ("data", "plot")  # what users install; the others are for work on the package
_REQUIREMENT = re.compile(r"""([\w.-]+)[^;]*;.*\bextra == ["'](\w+)["']""")
_NEURONS, _LAYERS, _FEATURES = 256, 12, 500  # of the network that is tried


@dataclass(frozen=True)
class Finding:
    """A line of what was found.

    Attributes:
        name: What was looked at.
        text: What is there, and what to do where something lacks.
        wrong: Whether something that should work does not.
    """

    name: str
    text: str
    wrong: bool = False


def doctor(_: list[str]) -> int:
    """Tells what of this installation works, what is missing, and how to get it."""
    findings = [finding for look in (_package, _memory, _cpu, _cuda, _extras, _cache) for finding in look()]
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.name:<{width}}  {'WRONG: ' if finding.wrong else ''}{finding.text}")
    wrong = sum(finding.wrong for finding in findings)
    print(f"\n{wrong} of these are wrong" if wrong else "\nnothing is wrong")
    return 1 if wrong else 0


def _package() -> Iterator[Finding]:
    built, installed = (".".join(map(str, version)) for version in _native.ffi_versions())
    yield Finding("versions", ", ".join(f"{name} {version}" for name, version in report.versions().items()))
    yield Finding("installed", f"{Path(spdnn_jax.__file__).parent}, core {_native.core.__file__}")
    yield Finding("FFI", f"built for {built}, jaxlib speaks {installed}")


def _memory() -> Iterator[Finding]:
    page = os.sysconf("SC_PAGE_SIZE")
    free, total = (os.sysconf(name) * page for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
    yield Finding("host memory", f"{_gib(total)}, {_gib(free)} free")


def _cpu() -> Iterator[Finding]:
    yield _tried("CPU back end", report.processor(), lambda: jax.devices("cpu")[0])


def _platforms() -> str | None:
    """Those that JAX was told to keep to, or None."""
    return jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]


def _cuda() -> Iterator[Finding]:
    driver = _driver()
    platforms = _platforms()
    kept_off = bool(platforms) and not {"cuda", "gpu"} & set(platforms.split(","))
    wanted = driver is not None and not kept_off
    shown = driver or "none: networks run on the CPU"
    yield Finding("GPU driver", f"{shown}; JAX_PLATFORMS={platforms} keeps JAX off GPUs" if kept_off else shown)
    if not _native.has_cuda_library():
        missing = "not built"
        if wanted:
            missing += ": reinstall with nvcc on the PATH: pip install --force-reinstall --no-deps . (see BUILD.md)"
        yield Finding("CUDA back end", missing, wrong=wanted)
    reason = _native.cuda_unavailable_reason()
    if reason is None:
        for device in jax.local_devices(backend="gpu"):
            memory = _gib((device.memory_stats() or {}).get("bytes_limit", 0))
            yield _tried(f"GPU {device.id}", f"{device.device_kind}, {memory} for JAX", lambda device=device: device)
    elif _native.has_cuda_library():
        yield Finding("CUDA back end", f"built, but not in use: {reason}", wrong=wanted)
    plugins = [name for name in ("jax-cuda12-plugin", "jax-cuda13-plugin") if _version(name)]
    if plugins or wanted:
        found = ", ".join(f"{name} {_version(name)}" for name in plugins)
        cure = "none: pip install 'spdnn_jax[cuda13]', or cuda12 for a driver older than 580"
        yield Finding("JAX's GPU plugin", found or cure, wrong=not plugins)


def _driver() -> str | None:
    """The NVIDIA driver and the GPUs that it sees, or None without one."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode == 0 and done.stdout.strip():
            return "; ".join(done.stdout.strip().splitlines())
    kernel = Path("/proc/driver/nvidia/version")
    return kernel.read_text(encoding="utf-8").splitlines()[0] if kernel.exists() else None


def _extras() -> Iterator[Finding]:
    needed: dict[str, list[str]] = {extra: [] for extra in _EXTRAS}
    for requirement in importlib.metadata.requires("spdnn_jax") or ():
        found = _REQUIREMENT.fullmatch(requirement)
        if found and found[2] in needed:
            needed[found[2]].append(found[1])
    for extra, names in needed.items():
        missing = [name for name in names if not _version(name)]
        cure = f"{', '.join(missing)} missing: pip install 'spdnn_jax[{extra}]'"
        yield Finding(f"extra {extra}", cure if missing else ", ".join(f"{name} {_version(name)}" for name in names))


def _cache() -> Iterator[Finding]:
    try:
        folder = input_cache.folder()
    except RuntimeError:
        yield Finding("input cache", "none: the user has no home; set XDG_CACHE_HOME")
        return
    held = sum(path.stat().st_size for path in folder.glob("*.bits"))
    yield Finding("input cache", f"{folder}, {held / 2**20:.1f} MiB: may be removed at any time")


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tried(name: str, text: str, device: Callable[[], Any]) -> Finding:
    """Runs a network on a device, and compares with the oracle, within its bounds of the error of float32."""
    try:
        with jax.default_device(device()):
            result = np.asarray(spdnn_jax.infer(_plan(), _features()))
    except Exception as error:  # whatever it is, it is what a person wants to know
        return Finding(name, f"{text}: fails: {' '.join(str(error).split())}", wrong=True)
    expected, errors = _expected()
    if not (np.abs(result - expected) <= errors).all():
        return Finding(name, f"{text}: gives wrong results on a network of {_NEURONS} x {_LAYERS}", wrong=True)
    return Finding(name, f"{text}: right on a network of {_NEURONS} x {_LAYERS}")


@functools.cache
def _plan() -> spdnn_jax.Plan:
    return spdnn_jax.build_plan(radixnet.layers(_NEURONS, _LAYERS))


@functools.cache
def _features() -> np.ndarray:
    return inputs.random(_NEURONS, _FEATURES, density=0.3)


@functools.cache
def _expected() -> tuple[np.ndarray, np.ndarray]:
    """Activations, and how far from them float32's may lie."""
    found = oracle.infer(radixnet.layers(_NEURONS, _LAYERS), _features(), errors=True)
    assert found.errors is not None
    return found.activations, found.errors


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
