"""What the doctor finds."""

import importlib.metadata

import jax
import numpy as np
import pytest

from spdnn_jax import _native
from spdnn_jax.command_line import doctor
from tests.command_line.program import started


def findings(capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, str]]:
    code = doctor.doctor([])
    lines = capsys.readouterr().out.splitlines()
    return code, {name.strip(): text.strip() for name, _, text in (line.partition("  ") for line in lines)}


def test_a_sound_installation() -> None:
    done = started("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "right on a network" in done.stdout
    assert "nothing is wrong" in done.stdout
    assert "WRONG" not in done.stdout


def test_wrong_results_are_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A doctor that compared a back end with itself would find every one of them sound."""
    nothing = np.zeros((doctor._FEATURES, doctor._NEURONS))
    monkeypatch.setattr(doctor, "_expected", lambda: (nothing, nothing))
    code, found = findings(capsys)
    assert code == 1
    assert found["CPU back end"].startswith("WRONG: ")
    assert "gives wrong results" in found["CPU back end"]


def test_a_back_end_that_fails_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> np.ndarray:
        raise RuntimeError("no such\n device")

    monkeypatch.setattr(doctor, "_features", fail)
    code, found = findings(capsys)
    assert code == 1
    assert found["CPU back end"].endswith("fails: no such device")


@pytest.mark.parametrize(
    ("built", "said"), [(False, "not built: reinstall with nvcc"), (True, "built, but not in use")]
)
def test_a_gpu_that_is_not_used(
    built: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA X, 80 GiB, 580.1")
    monkeypatch.setattr(doctor, "_version", lambda name: None)
    monkeypatch.setattr(_native, "has_cuda_library", lambda: built)
    monkeypatch.setattr(_native, "cuda_unavailable_reason", lambda: "JAX sees none")
    monkeypatch.setattr(doctor, "_platforms", lambda: None)  # which another test of this process may have set
    code, found = findings(capsys)
    assert code == 1
    assert found["GPU driver"] == "NVIDIA X, 80 GiB, 580.1"
    assert said in found["CUDA back end"]
    assert "pip install 'spdnn_jax[cuda13]'" in found["JAX's GPU plugin"]


def test_a_gpu_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_driver", lambda: "NVIDIA X, 80 GiB, 580.1")
    monkeypatch.setattr(_native, "has_cuda_library", lambda: False)
    monkeypatch.setattr(_native, "cuda_unavailable_reason", lambda: "JAX sees none")
    before = jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
    jax.devices()  # chosen already: what is set below is looked at by the doctor alone
    jax.config.update("jax_platforms", "cpu")
    try:
        code, found = findings(capsys)
    finally:
        jax.config.update("jax_platforms", before)
    assert code == 0
    assert found["GPU driver"].endswith("JAX_PLATFORMS=cpu keeps JAX off GPUs")
    assert found["CUDA back end"] == "not built"


def test_missing_extras_are_told_and_not_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version = importlib.metadata.version

    def without_matplotlib(name: str) -> str:
        if name == "matplotlib":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_matplotlib)
    code, found = findings(capsys)
    assert code == 0, [text for text in found.values() if "WRONG" in text]
    assert found["extra plot"] == "matplotlib missing: pip install 'spdnn_jax[plot]'"
    assert "safetensors" in found["extra data"]
