"""What the compiler made of the CUDA kernels: read off the built library, so neither a GPU nor nvcc is needed."""

import importlib.metadata
import re
import shutil
import subprocess

import pytest

from spdnn_jax import _native

FAMILIES = ("staged", "grouped", "resident", "chain")


@pytest.fixture(scope="module")
def cuobjdump() -> list[str]:
    """The tool and the library it reads; skips where one of them is absent."""
    if not _native.has_cuda_library():
        pytest.skip("built without CUDA")
    tool = _packaged_tool() or shutil.which("cuobjdump")
    if tool is None:
        pytest.skip("cuobjdump is absent: pip install nvidia-cuda-cuobjdump, or put the CUDA toolkit's on the PATH")
    return [tool, str(_native.CUDA_LIBRARY)]


def _packaged_tool() -> str | None:
    try:
        files = importlib.metadata.files("nvidia-cuda-cuobjdump") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((str(file.locate()) for file in files if file.name == "cuobjdump"), None)


def dump(command: list[str], option: str) -> str:
    return subprocess.run([command[0], option, command[1]], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage(cuobjdump: list[str]) -> dict[str, dict[str, dict[str, int]]]:
    """Registers and bytes of local memory of each kernel, by target."""
    targets: dict[str, dict[str, dict[str, int]]] = {}
    target = kernel = ""
    for line in dump(cuobjdump, "--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (sm_\w+)", line):
            target = found[1]
        elif found := re.match(r" *Function (\w+):", line):
            kernel = found[1]
        elif found := re.match(r" *REG:", line):
            figures = {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}
            targets.setdefault(target, {})[kernel] = figures
    return targets


def short(kernel: str) -> str:
    """A mangled name without its file's hash and its arguments: grouped_kernelILi16ELb1EtE."""
    found = re.search(r"[a-z][a-z_]*_kernel(I\w+?E(?=Ev))?", kernel)
    return found[0] if found else kernel


def test_every_target_holds_every_family(usage: dict[str, dict[str, dict[str, int]]]) -> None:
    """A report that was misread, and a kernel left out of a target, would pass the test below."""
    names = {target: {short(kernel) for kernel in kernels} for target, kernels in usage.items()}
    assert names, "no machine code at all"
    for target, kernels in names.items():
        assert kernels == set().union(*names.values()), target
        for family in FAMILIES:
            assert any(kernel.startswith(f"{family}_kernel") for kernel in kernels), (target, family)


def test_no_kernel_spills(usage: dict[str, dict[str, dict[str, int]]]) -> None:
    """Registers that spill, and arrays that are indexed at run time, live in device memory: slow, and silent."""
    spilled = [
        f"{target} {short(kernel)}: {figures['STACK'] + figures['LOCAL']} bytes beside {figures['REG']} registers"
        for target, kernels in usage.items()
        for kernel, figures in kernels.items()
        if figures["STACK"] or figures["LOCAL"]
    ]
    assert not spilled, "\n".join(spilled)


def test_newer_gpus_find_ptx(cuobjdump: list[str]) -> None:
    targets = re.findall(r"\.(sm_\w+)\.cubin", dump(cuobjdump, "--list-elf"))
    assert targets, "no machine code at all"
    if len(set(targets)) == 1:
        pytest.skip(f"built for {targets[0]} alone, with CMAKE_CUDA_ARCHITECTURES")
    assert "PTX file" in dump(cuobjdump, "--list-ptx")
