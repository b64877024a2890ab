"""Many calls at once: the same bits, and memory that does not grow."""

import gc
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from spdnn_jax import build_plan, categories, infer, layer
from tests.conftest import FUZZ, random_layer, random_network

CALLS, THREADS = 200, 8


def all_at_once(call: Callable[[int], object], calls: int = CALLS) -> None:
    """Any exception of any call is raised."""
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(call, range(calls)))


def put_on_cpu(y: np.ndarray) -> jax.Array:
    """Committed: the default device that the fixture `on_cpu` sets is that of one thread."""
    return jax.device_put(y, jax.devices("cpu")[0])


@pytest.mark.parametrize("compress", ["none", "full"])
def test_calls_at_once_give_the_same_bits(compress: str) -> None:
    """Whole networks, single layers and derivatives, of one plan, on one pool of threads."""
    network = random_network(0, [100, 200, 200, 50], grouped=4, bias="negative")
    plan = build_plan(network, compress=compress, derivatives=True)  # pyright: ignore[reportArgumentType]
    y0 = np.random.default_rng(0).random((300, 100), np.float32)
    slope = jax.jit(jax.grad(lambda y: infer(plan, y).sum()))
    runs = [
        lambda: infer(plan, y0),
        lambda: categories(plan, y0),
        lambda: layer(network.layers[0], y0),
        lambda: slope(y0),
    ]
    expected = [np.asarray(run()) for run in runs]
    assert all(result.any() for result in expected)

    def call(number: int) -> None:
        kind = number % len(runs)
        np.testing.assert_array_equal(runs[kind](), expected[kind])

    all_at_once(call)


def test_results_do_not_depend_on_the_shape(on_cpu: None) -> None:
    """A feature alone, or among any number of others; a GPU may choose other kernels for few than for many."""
    plan = build_plan(random_network(0, [60, 130, 40], grouped=4))
    y0 = put_on_cpu(np.random.default_rng(0).random((1000, 60), np.float32))
    whole = np.asarray(infer(plan, y0))
    counts = np.random.default_rng(1).permutation(np.arange(1, 1001))[: 1000 if FUZZ else 24]

    def call(number: int) -> None:
        count = int(counts[number])
        np.testing.assert_array_equal(infer(plan, y0[-count:]), whole[-count:])

    all_at_once(call, len(counts))


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_memory_does_not_grow(on_cpu: None) -> None:
    """A tile that was forgotten in each call would be 130 KiB, a result 0.5 MiB, in 1,000 calls from least to least.

    Between them the allocator holds now more, now less.
    """
    plan = build_plan(random_network(0, [256, 256, 256], density=0.05))
    y0 = put_on_cpu(np.random.default_rng(0).random((500, 256), np.float32))
    part = random_layer(np.random.default_rng(0), 256, 256, density=0.05)

    def call(number: int) -> None:
        jax.block_until_ready(infer(plan, y0) if number % 2 else layer(part, y0))

    held = []
    for _ in range(9):
        all_at_once(call)
        held.append(resident_bytes())
    assert min(held[6:]) - min(held[1:4]) < 64 << 20
