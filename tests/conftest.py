"""Fixtures: strict JAX settings, networks of every kind, and the rule for tests that need a GPU."""

import gc
import io
import itertools
import os
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np
import pytest

from spdnn_jax import Clip, SparseLayer, SparseNetwork, _native

if os.environ.get("SPDNN_REQUIRE_CUDA") != "1":  # programs of a test run once: most of the time goes into their code
    quick = "--xla_backend_optimization_level=0"
    if jax.__version_info__ < (0, 11):  # the older emitters take half as long; later versions do not have them
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{quick} {os.environ.get('XLA_FLAGS', '')}"

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 4)  # for tests/distributed; others use the first


FUZZ = os.environ.get("SPDNN_FUZZ") == "1"
"""Set by `make fuzz`: tests that try some damage try all of it, or a million kinds."""


@pytest.fixture(scope="session")
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for what is made once, whichever of pytest-xdist's workers needs it first."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session", autouse=True)
def _cache_folder(session_folder: Path) -> Iterator[None]:
    """Keeps the user's cache out of the tests, and the tests out of the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(session_folder / "cache"))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of official files beside the checkout; tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("SPDNN_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data"
    if not root.is_dir():
        pytest.skip(f"{root} is absent: set SPDNN_SHARED to the folder that holds data/graph-challenge and data/mnist")
    return root


@pytest.fixture(scope="session")
def cuda() -> None:
    """Skips where no GPU can be used; fails there under SPDNN_REQUIRE_CUDA=1."""
    reason = _native.cuda_unavailable_reason()
    if reason is None:
        return
    if os.environ.get("SPDNN_REQUIRE_CUDA") == "1":
        pytest.fail(f"SPDNN_REQUIRE_CUDA=1, but {reason}")
    pytest.skip(reason)


@pytest.fixture
def with_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are laid out as on a machine with a GPU."""
    monkeypatch.setattr("spdnn_jax.plan.cuda_unavailable_reason", lambda: None)


@pytest.fixture
def on_cpu() -> Iterator[None]:
    """Runs a test on the CPU back end, on a machine with a GPU, too."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores, for some tests do little but wait."""
    return _native.usable_cores() + 1


def pytest_collection_finish() -> None:
    """Keeps modules and tests, which stay, out of what the garbage collector goes through again and again."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says in one line what was skipped, and why."""
    skipped = terminalreporter.stats.get("skipped", [])
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in skipped)
    if reasons:
        terminalreporter.write_line("skipped: " + "; ".join(f"{n} ({why})" for why, n in reasons.most_common()))


def random_layer(
    generator: np.random.Generator,
    inputs: int,
    outputs: int,
    *,
    density: float = 0.3,
    one_value: bool = False,
    grouped: int = 1,
    bias: str = "vector",
) -> SparseLayer:
    """A layer with random edges.

    Args:
        generator: Source of randomness.
        inputs: Number of input neurons.
        outputs: Number of output neurons.
        density: Share of edges.
        one_value: All weights equal.
        grouped: Outputs that share a set of inputs, on average.
        bias: "vector", "scalar", or "negative" (a scalar below zero).
    """
    patterns = generator.random((inputs, max(1, outputs // grouped))) < density
    chosen = generator.integers(patterns.shape[1], size=outputs) if grouped > 1 else np.arange(outputs)
    pattern = patterns[:, chosen]
    values = np.full(pattern.shape, 0.25) if one_value else generator.normal(size=pattern.shape)
    values[values == 0] = 1
    layer_bias = {
        "vector": generator.normal(size=outputs) * 0.2,
        "scalar": np.float32(0.1),
        "negative": np.float32(-0.1),
    }[bias]
    return SparseLayer.from_dense(np.where(pattern, values, 0), layer_bias)


def random_network(
    seed: int,
    widths: list[int],
    cap: float | None = 32.0,
    activation: Clip | Iterable[Clip] | None = None,
    **layer_options: object,
) -> SparseNetwork:
    """A network of `random_layer` layers with the given widths; an activation goes before the cap."""
    generator = np.random.default_rng(seed)
    layers = [random_layer(generator, a, b, **layer_options) for a, b in itertools.pairwise(widths)]  # pyright: ignore[reportArgumentType]
    return SparseNetwork(layers, Clip.relu(cap) if activation is None else activation)


def official_archive(neurons: int, layer: bytes) -> bytes:
    """A tar file of two official layers with the same content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in (1, 2):
            member = tarfile.TarInfo(f"neuron{neurons}/n{neurons}-l{number}.tsv")
            member.size = len(layer)
            tar.addfile(member, io.BytesIO(layer))
    return buffer.getvalue()


def dense_reference(network: SparseNetwork, y0: np.ndarray) -> np.ndarray:
    """The network in float64 with dense matrices: an oracle for the oracle."""
    y = np.asarray(y0, np.float64)
    for layer, clip in zip(network.layers, network.activation, strict=True):
        y = y @ layer.to_scipy().toarray().astype(np.float64) + np.asarray(layer.bias, np.float64)
        y = np.clip(y, clip.lower, clip.upper)
    return y
