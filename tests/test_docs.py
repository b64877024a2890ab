"""The Python blocks of the pages run, one after the other, as a reader would run them."""

import re
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_python_blocks_run(page: str) -> None:
    for module in ("flax", "equinox", "optax"):
        pytest.importorskip(module)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    assert blocks
    scope: dict[str, Any] = {"__name__": page}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # the defaults, as a reader has them
        for block in blocks:
            exec(compile(block, page, "exec"), scope)
