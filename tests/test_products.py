"""Derivatives of `layer` and `apply`: every order and mode, under every transformation, against a dense twin."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from spdnn_jax import Clip, SparseLayer, SparseNetwork, apply, layer, products, trainable, with_weights
from tests.conftest import random_network
from tests.derivatives import assert_trees_close, dense_twin, smooth_features, sparse_twin

ACTIVATIONS = [Clip.relu(), Clip.relu(1.5), Clip.identity(), Clip(-1, 1), Clip(0.1, np.inf), Clip(-np.inf, 0.5)]


def small(activation: Clip = Clip.relu(1.5), **options: Any) -> SparseNetwork:  # noqa: B008
    network = random_network(0, [13, 10, 7], density=0.4, **options)
    return SparseNetwork(network.layers, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_second_order_in_both_modes(activation: Clip) -> None:
    network = small(activation)
    run, weights = sparse_twin(network), trainable(network)[0]
    y = smooth_features(network, 3)
    check_grads(run, (weights, y), order=2, modes=("fwd", "rev"), eps=1e-3, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize(
    ("shape", "density"),
    [
        ((1, 1, 1), 1.0),
        ((0, 4, 3), 0.5),
        ((3, 5, 2), 0.0),
        ((17, 33, 64), 0.05),
        ((65, 100, 40), 0.3),
        ((130, 40, 300), 0.9),
    ],
)
def test_gradients_equal_a_dense_layer_s(shape: tuple[int, int, int], density: float) -> None:
    """Odd shapes, tiles that are not full, rows without edges."""
    count, inputs, outputs = shape
    network = random_network(1, [inputs, outputs], density=density)
    (dense, weights), ours = dense_twin(network), sparse_twin(network)
    y = jnp.asarray(np.random.default_rng(2).normal(size=(count, inputs)).astype(np.float32))
    sums = jnp.asarray(np.random.default_rng(3).normal(size=(count, outputs)).astype(np.float32))
    got, expected = (
        jax.jit(jax.grad(lambda *arguments, run=run: (run(*arguments) * sums).sum(), (0, 1)))(weights, y)
        for run in (ours, dense)
    )
    assert_trees_close(got, expected)


@pytest.mark.parametrize("indexed", [True, False])
def test_one_value_and_one_bias_for_all(indexed: bool) -> None:
    """Their gradients are sums, whether the layer has its transposed index or derivatives work it out."""
    one = small(one_value=True, bias="scalar").layers[0]
    one = one.with_transposed() if indexed else one
    y = jnp.asarray(np.random.default_rng(0).normal(size=(20, 13)).astype(np.float32))

    def run(value: jax.Array, bias: jax.Array, spread: bool) -> jax.Array:
        values = jnp.broadcast_to(value, (one.edges,)) if spread else value
        biases = jnp.broadcast_to(bias, (one.outputs,)) if spread else bias
        return (layer(dataclasses.replace(one, values=values, bias=biases), y) ** 2).sum()

    scalars = jnp.float32(0.25), jnp.float32(0.1)
    together, apart = (
        jax.grad(lambda value, bias, spread=spread: run(value, bias, spread), (0, 1))(*scalars)
        for spread in (False, True)
    )
    assert_trees_close(together, apart)


def test_the_derivative_at_the_bounds_is_zero() -> None:
    """As of jax.nn.relu and relu6: a half there would make 0.125 of three dead layers."""
    identity = SparseLayer.from_dense(np.eye(3))
    y = jnp.asarray([[-1.0, 0.0, 2.0]])
    through = lambda y: layer(identity, layer(identity, y, cap=2.0), cap=2.0)  # noqa: E731
    np.testing.assert_array_equal(jax.jvp(through, (y,), (jnp.ones_like(y),))[1], [[0, 0, 0]])
    np.testing.assert_array_equal(jax.grad(lambda y: through(y).sum())(y), [[0, 0, 0]])
    inside = jnp.asarray([[0.5, 1.0, 1.5]])
    np.testing.assert_array_equal(jax.grad(lambda y: through(y).sum())(inside), [[1, 1, 1]])


def test_second_derivatives_in_the_weights() -> None:
    """The hessian of a loss in two layers' values mixes products of all three kinds."""
    network = small()
    (dense, weights), ours = dense_twin(network), sparse_twin(network)
    y = smooth_features(network, 4)

    def hessian(run: Any) -> Any:
        return jax.hessian(lambda values: (run((weights[0]._replace(values=values), *weights[1:]), y) ** 2).sum())

    assert_trees_close(hessian(ours)(weights[0].values), jax.jit(hessian(dense))(weights[0].values), 1e-4)


def test_vmap_of_gradients() -> None:
    """Of features each on its own, and of values that are mapped themselves."""
    network = small()
    run, (dense, weights) = sparse_twin(network), dense_twin(network)
    y = smooth_features(network, 4)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), weights)

    def of_each(run: Any) -> tuple[Any, Any, Any]:
        loss = lambda weights, y: (run(weights, y) ** 2).sum()  # noqa: E731
        each = jax.vmap(jax.grad(loss), in_axes=(None, 0))(weights, y[:, None])
        mapped = jax.vmap(jax.grad(loss, (0, 1)), in_axes=(0, None))(several, y)
        outside = jax.grad(lambda several: jax.vmap(loss, in_axes=(0, None))(several, y).sum())(several)
        return each, mapped, outside

    got, expected = (jax.jit(of_each, static_argnums=0)(run) for run in (run, dense))
    assert_trees_close(got, expected)


def test_scan_and_checkpoint() -> None:
    square = random_network(4, [9, 9], density=0.4).layers[0].with_transposed()
    y = jnp.asarray(np.random.default_rng(0).random((5, 9), np.float32))

    def step(y: jax.Array, values: jax.Array) -> jax.Array:
        return layer(dataclasses.replace(square, values=values), y)

    def scanned(values: jax.Array) -> jax.Array:
        return jax.lax.scan(jax.checkpoint(lambda y, _: (step(y, values), None)), y, length=3)[0].sum()

    values = jnp.asarray(square.values)
    unrolled = lambda values: step(step(step(y, values), values), values).sum()  # noqa: E731
    assert_trees_close(jax.grad(scanned)(values), jax.grad(unrolled)(values))


def test_under_shard_map(on_cpu: None) -> None:
    """Weights do not vary over the mesh and features do: the gradient of the weights is a sum over the devices."""
    network = small()
    run, weights = sparse_twin(network), trainable(network)[0]
    y = jnp.tile(smooth_features(network, 4), (2, 1))
    mesh = Mesh(np.asarray(jax.devices("cpu")[:4]), ("features",))
    spread = jax.shard_map(run, mesh=mesh, in_specs=(P(), P("features")), out_specs=P("features"), check_vma=True)
    got, expected = (jax.jit(jax.grad(lambda w, r=r: (r(w, y) ** 2).sum()))(weights) for r in (spread, run))
    assert_trees_close(got, expected)
    inside = jax.shard_map(
        jax.grad(lambda weights, y: (run(weights, y) ** 2).sum()),
        mesh=mesh, in_specs=(P(), P("features")), out_specs=P(),
    )  # fmt: skip
    assert_trees_close(jax.jit(inside)(weights, y), expected)


def test_without_jit() -> None:
    network = small()
    run, weights = sparse_twin(network), trainable(network)[0]
    y = smooth_features(network, 3)
    with jax.disable_jit():
        got = jax.grad(lambda weights: run(weights, y).sum())(weights)
    assert_trees_close(got, jax.grad(lambda weights: run(weights, y).sum())(weights))


def test_plain_xla_equals_the_native_back_end() -> None:
    """Other platforms run these: forward, and what the derivatives are made of."""
    network = random_network(3, [40, 33], density=0.2)
    one = network.layers[0].with_transposed()
    generator = np.random.default_rng(0)
    x, y = (jnp.asarray(generator.normal(size=(21, width)).astype(np.float32)) for width in (40, 33))
    values = jnp.asarray(one.values)
    assert one.transposed is not None
    structure = [
        jnp.asarray(a)
        for a in (one.indptr, one.indices, one.transposed.indptr, one.transposed.outputs, one.transposed.edges)
    ]
    structure[0] = structure[0].astype(jnp.int32)
    for transposed, activations in ((False, x), (True, y)):
        got = products.product_p.bind(activations, values, *structure, transposed=transposed)
        assert_trees_close(got, products._product_xla(activations, values, *structure, transposed=transposed))
    assert_trees_close(products.sampled_p.bind(x, y, *structure), products._sampled_xla(x, y, *structure))
    index = products.transposed_index(structure[0], structure[1], 40)
    assert_trees_close(index, tuple(structure[2:]))
    text = jax.jit(layer).trace(one, x).lower(lowering_platforms=("tpu",)).as_text()
    assert "spdnn_layer" not in text


def test_results_do_not_depend_on_the_run() -> None:
    network = random_network(6, [300, 200], density=0.3)
    run, weights = sparse_twin(network), trainable(network)[0]
    y = jnp.asarray(np.random.default_rng(0).random((300, 300), np.float32))
    gradient = jax.jit(jax.grad(lambda weights: run(weights, y).sum()))
    first = gradient(weights)
    for _ in range(10):
        jax.tree.map(np.testing.assert_array_equal, gradient(weights), first)


@pytest.mark.parametrize("kernels", ["baseline", "avx2", "avx512"])
def test_every_instruction_set(kernels: str, monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    monkeypatch.setenv("SPDNN_CPU_KERNELS", kernels)
    network = random_network(13, [100, 90], density=0.3)
    (dense, weights), ours = dense_twin(network), sparse_twin(network)
    y = jnp.asarray(np.random.default_rng(0).random((150, 100), np.float32))
    try:
        got = jax.block_until_ready(jax.grad(lambda w: (ours(w, y) ** 2).sum())(weights))
    except (ValueError, jax.errors.JaxRuntimeError) as error:  # which of them is JAX's choice
        assert "names no kernels that run on this processor" in str(error)
        pytest.skip(f"this processor has no {kernels}")
    assert_trees_close(got, jax.grad(lambda w: (dense(w, y) ** 2).sum())(weights))


def test_weights_come_apart_and_together() -> None:
    network = small()
    weights, structure = trainable(network)
    again = with_weights(structure, weights)
    y = smooth_features(network, 3)
    np.testing.assert_array_equal(apply(again, y), apply(network, y))
    assert all(jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in jax.tree.leaves(weights))
    assert all(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(structure))
    with pytest.raises(ValueError, match="1 layers of weights were given, but the network has 2"):
        with_weights(structure, weights[:1])


def test_a_whole_network_under_equinox() -> None:
    equinox = pytest.importorskip("equinox")
    network = small()
    y = smooth_features(network, 3)
    got = equinox.filter_grad(lambda network: (apply(network, y) ** 2).sum())(network)
    run, weights = sparse_twin(network), trainable(network)[0]
    expected = jax.grad(lambda weights: (run(weights, y) ** 2).sum())(weights)
    for layer_gradient, own in zip(got.layers, expected, strict=True):
        assert_trees_close((layer_gradient.values, layer_gradient.bias), tuple(own))


def test_a_whole_network_under_nnx() -> None:
    nnx = pytest.importorskip("flax.nnx")
    network = small()
    y = smooth_features(network, 3)
    weights, structure = trainable(network)

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.weights = nnx.Param(weights)

    loss = lambda model: (apply(with_weights(structure, model.weights.get_value()), y) ** 2).sum()  # noqa: E731
    got = nnx.grad(loss)(Model())
    expected = jax.grad(lambda weights: (apply(with_weights(structure, weights), y) ** 2).sum())(weights)
    assert_trees_close(jax.tree.leaves(got), jax.tree.leaves(expected))
