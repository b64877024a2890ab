"""The derivative of `infer` in the features: every mode, under every transformation, for every kind of plan."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from spdnn_jax import Clip, Plan, SparseNetwork, build_plan, categories, chain, infer, ops
from spdnn_jax.simplify import Compress
from tests.conftest import random_network
from tests.derivatives import assert_trees_close, dense_twin, smooth_features


def example(compress: Compress = "none", **options: Any) -> tuple[SparseNetwork, Plan]:
    network = random_network(1, [45, 33, 64, 40, 20], density=0.2, **options)
    bounds = (Clip.relu(1.5), Clip(-1, 1), Clip.identity(), Clip.relu())
    network = SparseNetwork(network.layers, bounds)
    return network, build_plan(network, compress=compress, derivatives=True)


def some_features(count: int, inputs: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(count).random((count, inputs), np.float32))


@pytest.mark.parametrize(
    ("compress", "grouped", "bias", "count"),
    [("none", 1, "vector", 70), ("none", 7, "scalar", 1), ("neurons", 7, "scalar", 37), ("full", 7, "negative", 37)],
)
def test_equals_the_dense_derivative(compress: Compress, grouped: int, bias: str, count: int) -> None:
    network, plan = example(compress, grouped=grouped, bias=bias)
    dense, weights = dense_twin(network)
    y = some_features(count, 45)
    cotangent = some_features(count, 20)

    def derivatives(run: Any) -> Any:
        result, back = jax.vjp(run, y)
        return result, jax.jvp(run, (y,), (0.5 - y,))[1], back(cotangent)

    assert_trees_close(derivatives(lambda y: infer(plan, y)), derivatives(lambda y: dense(weights, y)), 2e-5)


def test_second_order_in_both_modes() -> None:
    """Zero but where something follows the network: it is linear around a point."""
    network = random_network(0, [13, 10, 7], 1.5, density=0.4)
    plan, y = build_plan(network, derivatives=True), smooth_features(network, 3)
    check_grads(lambda y: infer(plan, y), (y,), order=2, modes=("fwd", "rev"), eps=1e-3, rtol=3e-2, atol=3e-2)
    dense, weights = dense_twin(network)
    got, expected = (jax.hessian(lambda y, run=run: (run(y) ** 2).sum())(y) for run in (
        lambda y: infer(plan, y), lambda y: dense(weights, y)))  # fmt: skip
    assert_trees_close(got, expected, 1e-4)


def test_jacobians_vmap_scan_and_checkpoint() -> None:
    network = random_network(2, [12, 30, 12], 2.0, density=0.3)
    plan, (dense, weights) = build_plan(network, derivatives=True), dense_twin(network)
    y = some_features(5, 12)

    def all_of(run: Any) -> Any:
        one = jax.vmap(jax.jacrev(lambda row: run(row[None])[0]))(y)
        forward = jax.jacfwd(run)(y)
        scanned = jax.grad(lambda y: jax.lax.scan(jax.checkpoint(lambda y, _: (run(y), None)), y, length=3)[0].sum())(y)
        mapped = jax.grad(lambda y: jax.vmap(run, in_axes=1)(jnp.stack([y, 2 * y], axis=1)).sum())(y)
        return one, forward, scanned, mapped

    got, expected = (jax.jit(all_of, static_argnums=0)(run) for run in (
        lambda y: infer(plan, y), lambda y: dense(weights, y)))  # fmt: skip
    assert_trees_close(got, expected, 2e-5)


def test_under_shard_map(on_cpu: None) -> None:
    _, plan = example()
    y = some_features(8, 45)
    mesh = Mesh(np.asarray(jax.devices("cpu")[:4]), ("features",))
    spread = jax.shard_map(infer, mesh=mesh, in_specs=(P(), P("features")), out_specs=P("features"), check_vma=True)
    got, expected = (jax.jit(jax.grad(lambda y, run=run: (run(plan, y) ** 2).sum()))(y) for run in (spread, infer))
    assert_trees_close(got, expected)


@pytest.mark.parametrize("compress", ["none", "full"])
def test_plain_xla_equals_the_native_back_end(compress: Compress) -> None:
    """One loop with one body, whatever the layers; masks agree bit by bit."""
    _, plan = example(compress, grouped=3)
    assert plan.rows is not None
    words, table = plan.rows.words, plan.rows.table
    y, cotangent = some_features(19, 45), some_features(19, 20)
    native = chain.chain_p.bind(y, words, table=table)
    xla = jax.jit(chain._chain_xla, static_argnames="table")(y, words, table=table)
    assert_trees_close(native[0], xla[0])
    np.testing.assert_array_equal(native[1], xla[1])
    run = jax.jit(chain._chain_derivative_xla, static_argnames=("table", "transposed"))
    for transposed, tangent in ((False, y), (True, cotangent)):
        got = chain.chain_derivative_p.bind(tangent, native[1], words, table=table, transposed=transposed)
        assert_trees_close(got, run(tangent, native[1], words, table=table, transposed=transposed))


@pytest.mark.parametrize("features", [0, 1, 64, 65])
def test_any_number_of_features(features: int) -> None:
    _, plan = example()
    y = some_features(features, 45)
    assert jax.grad(lambda y: infer(plan, y).sum())(y).shape == y.shape


def test_the_program_does_not_grow_with_the_layers() -> None:
    """Layers that all differ would otherwise take minutes to compile."""

    def lines(layers: int) -> int:
        plan = build_plan(random_network(layers, [30] * layers, density=0.2), derivatives=True)
        gradient = jax.jit(jax.grad(lambda y, plan: infer(plan, y).sum()))
        return gradient.lower(jnp.ones((4, 30)), plan).as_text().count("\n")

    assert lines(40) == lines(3)


def test_what_has_no_derivative() -> None:
    network, plan = example()
    y = some_features(4, 45)
    without = build_plan(network)
    with pytest.raises(ValueError, match="derivatives=True"):
        jax.grad(lambda y: infer(without, y).sum())(y)
    assert_trees_close(
        jax.grad(lambda y: infer(without.with_derivatives(), y).sum())(y),
        jax.grad(lambda y: infer(plan, y).sum())(y),
    )
    bits = jnp.ones((3, 45), jnp.uint8)
    _, tangent = jax.jvp(lambda s: infer(without, bits) * s, (jnp.float32(2),), (jnp.float32(1),))
    np.testing.assert_array_equal(tangent, infer(without, bits))
    gradient = jax.grad(lambda y: jnp.where(categories(without, y), y.sum(axis=1), 0).sum())(y)
    assert gradient.shape == y.shape
    counted, _ = jax.jvp(lambda y: ops.activations_and_active(plan, y)[0], (y,), (y,))
    np.testing.assert_allclose(counted, infer(plan, y), atol=1e-5)
