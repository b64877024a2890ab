"""Networks run piece by piece give what they give whole, whatever is dropped, exchanged and streamed in between."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from spdnn_jax import Plan, build_plan, infer, ops
from spdnn_jax.distributed import pieces
from spdnn_jax.distributed.mesh import AXIS, imbalance, place
from spdnn_jax.graph_challenge import radixnet
from tests.conftest import random_network

pytestmark = pytest.mark.usefixtures("on_cpu")


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.asarray(jax.devices("cpu")[:devices]), (AXIS,))


def example(bias: str, grouped: int = 1) -> tuple[Plan, np.ndarray]:
    network = random_network(5, [40, 50, 30, 70, 30, 20, 9], bias=bias, grouped=grouped, density=0.2)
    y0 = np.random.default_rng(2).random((150, 40)) < 0.2
    return build_plan(network), y0


def check(plan: Plan, y0: np.ndarray, mesh: Mesh, parts: Iterable[Plan], **options: Any) -> pieces.Outcome:
    dealt = place(y0, len(y0), mesh)
    outcome = pieces.run(parts, dealt, table=plan.table, features=len(y0), mesh=mesh, activations=True, **options)
    alive, active = ops.categories_and_active(plan, y0)
    np.testing.assert_array_equal(outcome.activations, infer(plan, y0))
    np.testing.assert_array_equal(outcome.alive, alive)
    np.testing.assert_array_equal(outcome.active.sum(axis=0), active)
    return outcome


@pytest.mark.parametrize("bias", ["vector", "scalar", "negative"])
@pytest.mark.parametrize("length", [1, 3, 6])
@pytest.mark.parametrize("devices", [1, 4])
def test_streamed_equals_whole(devices: int, length: int, bias: str) -> None:
    """A piece that restored the neurons' order, or dropped features that come alive again, would differ."""
    plan, y0 = example(bias, grouped=3)
    mesh = mesh_of(devices)
    check(plan, y0, mesh, pieces.stream(plan, pieces.equal_pieces(plan.layers, length), mesh))


@pytest.mark.parametrize("bias", ["vector", "negative"])
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_dealt_anew_equals_whole(devices: int, bias: str) -> None:
    """An exchange must carry each survivor's identity with it, and must not happen where the dead may wake."""
    plan, y0 = example(bias)
    mesh = mesh_of(devices)
    outcome = check(plan, y0, mesh, pieces.resident(plan, ((0, 2), (2, 6)), mesh), rebalance="always")
    assert outcome.exchanges == ([2] if bias == "negative" else [])


def test_exchange_evens_out() -> None:
    """Survivors all on one device, as an unlucky input has them, end on all devices."""
    plan = build_plan(random_network(5, [40, 30, 30, 30], bias="negative", density=0.2))
    y0 = np.zeros((400, 40), np.float32)
    y0[::4] = np.random.default_rng(0).random((100, 40), np.float32)
    mesh = mesh_of(4)
    outcome = check(plan, y0, mesh, pieces.resident(plan, ((0, 1), (1, 3)), mesh), rebalance="always")
    assert imbalance(outcome.active[:, 0]) == 4
    assert imbalance(outcome.active[:, 1]) < 1.2


def test_no_more_than_two_pieces_are_held() -> None:
    """Streaming is for networks that do not fit: a third piece on the device would not."""
    plan, y0 = example("negative")
    mesh, bounds = mesh_of(1), pieces.equal_pieces(plan.layers, 1)
    sizes = {piece.words.size for piece in pieces.resident(plan, bounds, mesh)}
    assert len(sizes) == plan.layers, "sizes tell the pieces apart"
    held: list[int] = []

    def watched() -> Iterator[Plan]:
        parts = pieces.stream(plan, bounds, mesh)
        while True:
            piece = next(parts, None)
            if piece is None:
                return
            time.sleep(0.1)  # the next one's copy arrives
            held.append(len({array.size for array in jax.live_arrays("cpu")} & sizes))
            yield piece
            del piece

    check(plan, y0, mesh, watched())
    assert len(held) == plan.layers
    assert max(held) <= 2, held


def test_a_plan_mapped_from_a_file(tmp_path: Path) -> None:
    plan, y0 = example("negative")
    plan.save(tmp_path / "plan.safetensors")
    mapped = Plan.open(tmp_path / "plan.safetensors")
    assert isinstance(mapped.words, np.memmap)
    mesh = mesh_of(2)
    check(plan, y0, mesh, pieces.stream(mapped, pieces.equal_pieces(plan.layers, 2), mesh))


def test_equal_pieces_compile_once() -> None:
    """A deep network in hundreds of pieces must not compile hundreds of programs."""
    plan = build_plan(radixnet.layers(64, 40))
    tables = {piece.table for piece in pieces.resident(plan, pieces.equal_pieces(40, 2), mesh_of(1))}
    assert len(tables) == 1


def test_the_rule_of_exchange() -> None:
    even, uneven = np.asarray([250, 250]), np.asarray([400, 100])
    assert not pieces.exchange_pays(even, 65536, 10**12)
    assert pieces.exchange_pays(uneven, 65536, 100 * 65536 * 32)
    assert not pieces.exchange_pays(uneven, 65536, 65536 * 32)


def test_what_fits() -> None:
    table = build_plan(radixnet.layers(1024, 40)).table
    whole = int(table.header["words"]) * 4
    assert pieces.fit(table, 1000, 1024, 1, None) == pieces.Fit(40, 1000)
    assert pieces.fit(table, 1000, 1024, 1, 100 * whole) == pieces.Fit(40, 1000)
    tight = pieces.fit(table, 10**6, 1024, 2, whole)
    assert tight.layers < 40
    assert tight.features < 10**6
    largest = int(table.layers["words"].max()) * 4
    assert 2 * tight.layers * largest + tight.features // 2 * (1024 + 20 * 1024) <= whole
    with pytest.raises(ValueError, match="a layer of this network does not fit"):
        pieces.fit(table, 10, 1024, 1, largest)
    with pytest.raises(ValueError, match="at least one layer"):
        pieces.equal_pieces(4, 0)
