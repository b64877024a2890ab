"""Small networks of every odd shape, run by every kernel family and compared with the float64 oracle.

    python -m benchmarks.cuda_ext.sanitize_cases [--tiny]

`sanitize.py` runs this under compute-sanitizer. Everything that the kernels read comes from the host, so that the
sanitizer sees who wrote it, and before every call freed device memory holds NaN: a workspace that a kernel takes for
zero shows.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_layers import random_layer
from spdnn_jax import SparseNetwork, _native, apply, build_plan, infer, ops, pack_bits, planner, trainable, with_weights
from spdnn_jax.graph_challenge import oracle, radixnet
from spdnn_jax.plan import Plan
from spdnn_jax.simplify import Compress

LAYER = "layer"
"""Beside the families: the kernel of the single-layer primitive, `spdnn_jax.layer`."""

DERIVATIVES = "derivatives"
"""The kernels of derivatives, in features, values and biases."""

FAMILIES: tuple[str, ...] = (*planner.KERNELS, LAYER, DERIVATIVES)

AGREED = "all cases agree with the oracle"
"""The last line of a run that went well."""

_REFUSAL = "too wide"  # what a family says of a network that it does not take
_TILES = (4, 32, 128)  # features that some kernel handles together
_NAN_BYTE = 0xFF


@dataclass(frozen=True)
class Case:
    """A network and its input.

    Attributes:
        name: What it is about.
        network: Builds the network.
        features: Number of features.
        form: "float32", "uint8", "bool" or "packed".
        tiny: Small enough for the slowest check.
        compress: As in `build_plan`.
        families: Of `FAMILIES`, those that it is for; None: all, but derivatives, which compile for seconds, where it
            is tiny alone.
    """

    name: str
    network: Callable[[], SparseNetwork]
    features: int
    form: str = "float32"
    tiny: bool = False
    compress: Compress = "none"
    families: tuple[str, ...] | None = None

    def is_for(self, family: str) -> bool:
        """Whether it is for a family."""
        if self.families is None:
            return self.tiny or family != DERIVATIVES
        return family in self.families


def _chain(widths: Sequence[int], edges: int, share: int = 1, one_value: bool = False) -> SparseNetwork:
    """Random layers, `edges` inputs an output; biases of every kind in turn."""
    generator = np.random.default_rng(len(widths))
    layers = []
    for number, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        bias = (-0.05, generator.normal(0, 0.1, outputs), 0.05)[number % 3]
        rows = np.full(outputs, min(edges, inputs))
        layers.append(random_layer(generator, inputs, rows, share=share, one_value=one_value, bias=bias))
    return SparseNetwork(tuple(layers), cap=32.0)


def _uneven_rows() -> SparseNetwork:
    generator = np.random.default_rng(0)
    first = random_layer(generator, 6001, np.asarray([0, 1, 5000, 3, 0, 2, 7]))
    return SparseNetwork((first, random_layer(generator, 7, np.asarray([7, 0, 1]), bias=0.05)), cap=None)


def cases() -> list[Case]:
    """All cases."""
    odd = functools.partial(_chain, (45, 33, 64, 21), 5, share=3)
    single = functools.partial(_chain, (1, 1, 1), 1)
    alone = functools.partial(_chain, (130, 67, 99), 9)
    shared_value = functools.partial(_chain, (100, 160, 50), 12, share=20, one_value=True)
    challenge = functools.partial(radixnet.network, 64, 14)
    searched = functools.partial(_chain, (40,) * 36, 40)
    mixed = functools.partial(_chain, (60, 70, 17000, 50, 40), 6, share=4)
    wide = functools.partial(_chain, (70001, 50, 70001, 4), 40)
    sliced = functools.partial(_chain, (2400, 700, 1300), 60)
    forms = ("uint8", "packed", "bool", "float32")
    sizes = sorted({size for tile in _TILES for size in (tile - 1, tile, tile + 1)})
    boundaries = [
        Case(f"{size} features, {forms[k % 4]}", odd, size, forms[k % 4], tiny=size == 33)
        for k, size in enumerate(sizes)
    ]
    return [
        Case("1 neuron, 1 feature", single, 1, tiny=True),
        *boundaries,
        Case("no shared inputs", alone, 50, "float32", tiny=True),
        Case("no shared inputs, many features", alone, 1100, tiny=True),
        Case("no shared inputs, more features", alone, 8500, "packed"),
        Case("large groups, one weight", shared_value, 70, "uint8", tiny=True),
        Case("challenge network", challenge, 200, "packed", tiny=True),
        Case("rows of 0 and 5,000 edges", _uneven_rows, 37),
        Case("indices of 32 bits", wide, 5),
        Case("layers of several families", mixed, 37, "uint8", tiny=True),
        Case("equal features are looked for", searched, 70, "uint8", tiny=True, compress="full"),
        Case("rows that are cut into slices", sliced, 900, families=(LAYER, DERIVATIVES)),
    ]


def plain_features(case: Case, inputs: int) -> np.ndarray:
    """The input as numbers: 0 and 1, or anything in between for float32; the second feature, if any, is all zero."""
    plain = np.random.default_rng(case.features).random((case.features, inputs), np.float32)
    plain = plain if case.form == "float32" else (plain < 0.3).astype(np.float32)
    plain[1:2] = 0
    return plain


def _in_form(plain: np.ndarray, form: str) -> np.ndarray:
    return pack_bits(plain) if form == "packed" else plain.astype(form)


def run_case(case: Case, family: str) -> bool:
    """Runs a case. Returns False where the family does not take such a network.

    Args:
        case: The case.
        family: One of `FAMILIES`.

    Raises:
        AssertionError: The result is not the oracle's.
    """
    network = case.network()
    plain = plain_features(case, network.layers[0].inputs)
    expected = oracle.infer(network, plain)
    if family == LAYER:
        _assert_close(_layer_by_layer(network, plain), expected.activations)
        return True
    if family == DERIVATIVES:
        _compare_derivatives(network, plain)
        return True
    y0 = jax.device_put(_in_form(plain, case.form))
    try:
        plan = build_plan(network, kernel=family, compress=case.compress)  # pyright: ignore[reportArgumentType]
        _poison(plan, case.features)
        result = jax.block_until_ready(infer(plan, y0))
        _poison(plan, case.features)
        alive, active = jax.block_until_ready(ops.categories_and_active(plan, y0))
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        if _REFUSAL in str(error):
            return False
        raise
    _assert_close(result, expected.activations)
    np.testing.assert_array_equal(np.asarray(alive), expected.categories)
    np.testing.assert_array_equal(np.asarray(active), expected.active)
    return True


def _layer_by_layer(network: SparseNetwork, plain: np.ndarray) -> jax.Array:
    y = jax.device_put(plain)
    for layer, clip in zip(network.layers, network.activation, strict=True):
        y = ops.layer(layer, y, activation=clip)
    return jax.block_until_ready(y)


def _compare_derivatives(network: SparseNetwork, plain: np.ndarray) -> None:
    """Compares with the derivatives on the CPU; a sum that crosses zero by rounding moves some of them."""
    with jax.default_device(jax.devices("cpu")[0]):
        expected = _derivatives(network, plain)
    for got, wanted in zip(_derivatives(network, plain), expected, strict=True):
        off = np.abs(np.asarray(got, np.float64) - wanted) > 2e-5 * max(1.0, float(np.abs(wanted).max(initial=0)))
        assert np.mean(off) < 5e-3, f"{np.mean(off):.1%} of the derivatives differ"


def _derivatives(network: SparseNetwork, plain: np.ndarray) -> list[jax.Array]:
    y, plan = jnp.asarray(plain), build_plan(network, derivatives=True)
    of_features = jax.grad(lambda y: infer(plan, y).sum())(y)
    weights, structure = trainable(network)
    of_weights = jax.grad(lambda weights: apply(with_weights(structure, weights), y).sum())(weights)
    return jax.block_until_ready([of_features, *jax.tree.leaves(of_weights)])


def _assert_close(got: jax.Array, expected: np.ndarray) -> None:
    scale = max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(np.asarray(got, np.float64), expected, atol=2e-5 * scale)


def _poison(plan: Plan, count: int) -> None:
    """Leaves NaN in the memory that the allocator is about to hand out as workspace and as result."""
    if jax.default_backend() != "gpu":
        return
    sizes = (_native.cuda_workspace_bytes(plan.table.records, count), 4 * count * plan.outputs)
    poison = [jax.device_put(np.full(size, _NAN_BYTE, np.uint8)) for size in sizes]
    for array in jax.block_until_ready(poison):
        array.delete()


def main() -> int:
    """Runs the cases; says how each ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="only the smallest cases, for slow checks")
    arguments = parser.parse_args()
    reason = _native.cuda_unavailable_reason()
    if reason:
        print(f"no kernel can be run: {reason}", file=sys.stderr)
        return 1
    jnp.zeros(1).block_until_ready()  # starts the device, which takes longest
    chosen = [case for case in cases() if case.tiny or not arguments.tiny]
    for family in FAMILIES:
        ran = 0
        for case in (case for case in chosen if case.is_for(family)):
            took = run_case(case, family)
            ran += took
            print(f"{family}: {case.name}: {'agrees' if took else 'refused, as too wide'}", flush=True)
        if ran == 0:
            print(f"{family}: refused every case", file=sys.stderr)
            return 1
    print(AGREED, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
