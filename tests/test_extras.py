"""Optional packages: what a missing one says."""

import sys
from pathlib import Path

import pytest

from spdnn_jax._extras import require


def test_returns_the_module() -> None:
    assert require("json.decoder", extra="data", purpose="reading") is sys.modules["json.decoder"]


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"^saving a plan needs safetensors: pip install 'spdnn_jax\[data\]'$"):
        require("safetensors", extra="data", purpose="saving a plan")


def test_a_broken_package_says_what_it_misses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package that cannot import one of its own needs must not be reported as not installed."""
    (tmp_path / "broken_package.py").write_text("import what_it_needs\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="what_it_needs"):
        require("broken_package", extra="data", purpose="anything")
