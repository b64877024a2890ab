"""`SparseLinear` of both libraries: values and gradients of a masked dense layer, and a pattern that training keeps."""

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from jax.experimental import sparse

from spdnn_jax import Clip, SparseLayer, SparseNetwork, build_plan, infer
from tests.conftest import random_layer

optax = pytest.importorskip("optax")
LIBRARIES = ["flax", "equinox"]
WEIGHTS = np.where(np.random.default_rng(0).random((12, 8)) < 0.3, np.random.default_rng(1).normal(size=(12, 8)), 0)
BIAS = np.linspace(-1, 1, 8)
Y = np.random.default_rng(2).normal(size=(5, 12)).astype(np.float32)


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return request.param


def linear(library: str, *arguments: Any, **options: Any) -> Any:
    return importlib.import_module(f"spdnn_jax.nn.{library}").SparseLinear(*arguments, **options)


def value_and_grad(library: str, loss: Callable[[Any], jax.Array], module: Any) -> tuple[jax.Array, Any, Any]:
    """The loss, and its gradients to the weights and the biases of a module, as the library computes them."""
    if library == "flax":
        from flax import nnx

        value, gradient = nnx.value_and_grad(loss)(module)
        assert {path for path, _ in nnx.to_flat_state(gradient)} == {("values",), ("bias",)}  # not the pattern
        return value, gradient["values"][...], gradient["bias"][...]
    import equinox as eqx

    value, gradient = eqx.filter_value_and_grad(loss)(module)
    assert gradient.layer.indptr is gradient.layer.indices is None
    return value, gradient.layer.values, gradient.layer.bias


CONTAINERS: dict[str, Callable[[np.ndarray], Any]] = {
    "NumPy": np.asarray,
    "JAX": jnp.asarray,
    "SciPy array": sp.csr_array,
    "SciPy matrix": sp.coo_matrix,
    "BCOO": lambda w: sparse.BCOO.fromdense(jnp.asarray(w, jnp.float32)),
    "BCSR": lambda w: sparse.BCSR.fromdense(jnp.asarray(w, jnp.float32)),
    "SparseLayer": lambda w: SparseLayer.from_dense(w, BIAS),
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_from_any_matrix(library: str, container: str) -> None:
    bias = None if container == "SparseLayer" else BIAS
    module = linear(library, CONTAINERS[container](WEIGHTS), bias)
    np.testing.assert_allclose(module(Y), Y @ WEIGHTS + BIAS, rtol=1e-5, atol=1e-5)
    zero = linear(library, CONTAINERS[container](WEIGHTS), 0.0)
    np.testing.assert_allclose(zero(Y), Y @ WEIGHTS, rtol=1e-5, atol=1e-5)


def test_what_is_no_matrix_is_refused(library: str) -> None:
    with pytest.raises(ValueError, match=r"must be a matrix \(inputs, outputs\)"):
        linear(library, np.ones(3))
    with pytest.raises(ValueError, match="bias must have shape"):
        linear(library, WEIGHTS, np.ones(3))
    with pytest.raises(ValueError, match="bias must have shape"):
        linear(library, SparseLayer.from_dense(WEIGHTS), np.ones(3))


@pytest.mark.parametrize("activation", [None, Clip.relu(), Clip(-1, 1)])
def test_gradients_are_those_of_a_masked_dense_layer(library: str, activation: Clip | None) -> None:
    bounds = activation or Clip.identity()
    mask = jnp.asarray(WEIGHTS != 0, jnp.float32)

    def dense_loss(weights: jax.Array, bias: jax.Array) -> jax.Array:
        product = jnp.matmul(Y, weights * mask, precision="highest")  # a GPU's usual one rounds to TF32
        return (jnp.clip(product + bias[None], bounds.lower, bounds.upper) ** 2).sum()

    value, (of_weights, of_bias) = jax.value_and_grad(dense_loss, (0, 1))(
        jnp.asarray(WEIGHTS, jnp.float32), jnp.asarray(BIAS, jnp.float32)
    )
    module = linear(library, WEIGHTS, BIAS, activation=activation)
    found, of_values, of_own_bias = value_and_grad(library, lambda module: (module(Y) ** 2).sum(), module)
    np.testing.assert_allclose(found, value, rtol=1e-5)
    order = np.nonzero(WEIGHTS.T)  # a layer's edges stand output by output
    np.testing.assert_allclose(of_values, np.asarray(of_weights).T[order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(of_own_bias, of_bias, rtol=1e-4, atol=1e-5)


def test_one_weight_for_all_edges_becomes_one_for_each(library: str) -> None:
    """They start equal and part in training."""
    layer = SparseLayer(np.array([0, 1, 3]), np.array([0, 0, 1]), np.float32(0.5), np.float32(0.25), 2)  # pyright: ignore[reportArgumentType]
    module = linear(library, layer)
    _, of_values, of_bias = value_and_grad(library, lambda module: module(jnp.array([[1.0, 2.0]])).sum(), module)
    assert of_values.tolist() == [1, 1, 2]
    assert of_bias.tolist() == [1, 1]


def test_vectors_and_more_axes(library: str) -> None:
    module = linear(library, WEIGHTS, BIAS)
    expected = module(Y)
    np.testing.assert_allclose(module(Y[0]), expected[0], rtol=1e-6)
    np.testing.assert_allclose(module(Y.reshape(5, 1, 12)), expected.reshape(5, 1, 8), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(module)(Y), expected, rtol=1e-6)
    assert module(Y[:0]).shape == (0, 8)
    with pytest.raises(ValueError, match="features must have shape"):
        module(Y[:, 1:])


def test_a_missing_library_names_its_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.delitem(sys.modules, f"spdnn_jax.nn.{library}", raising=False)
    with pytest.raises(ImportError, match=rf"spdnn_jax\.nn\.{library} needs {library}: .*\[{library}\]"):
        importlib.import_module(f"spdnn_jax.nn.{library}")


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """Optax raises a float to the power of an int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def layers_and_target() -> tuple[list[SparseLayer], np.ndarray]:
    """Two layers, and what others with the same edges, and others' weights, make of Y."""
    generator = np.random.default_rng(4)
    start = [random_layer(generator, 12, 16), random_layer(generator, 16, 3)]
    other = SparseNetwork(
        [
            SparseLayer(x.indptr, x.indices, x.values * np.float32(1.5), x.bias + np.float32(0.1), x.inputs)
            for x in start
        ],
        [Clip.relu(), Clip.identity()],
    )
    return start, np.asarray(infer(build_plan(other), Y))


def check_trained(before: list[SparseLayer], after: list[Any], losses: list[float], model: Callable) -> None:
    """Training helped, kept the pattern, and what it made runs as a network."""
    assert losses[-1] < 0.1 * losses[0]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one.indices, other.layer.indices)
        np.testing.assert_array_equal(one.indptr, other.layer.indptr)
        assert not np.array_equal(one.values, other.layer.values)
        assert not np.array_equal(one.bias, other.layer.bias)
    network = SparseNetwork([module.layer for module in after], [module.activation for module in after]).validate()
    np.testing.assert_allclose(infer(build_plan(network), Y), model(Y), rtol=1e-4, atol=1e-5)


def test_training_with_flax_and_optax(standard_promotion: None) -> None:
    pytest.importorskip("flax")
    from flax import nnx

    from spdnn_jax.nn.flax import SparseLinear

    start, target = layers_and_target()
    model = nnx.Sequential(SparseLinear(start[0], activation=Clip.relu()), SparseLinear(start[1]))
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=nnx.Param)

    @nnx.jit
    def step(model: Any, optimizer: Any) -> jax.Array:
        loss, gradient = nnx.value_and_grad(lambda model: jnp.mean((model(Y) - target) ** 2))(model)
        optimizer.update(model, gradient)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(150)]
    check_trained(start, list(model.layers), losses, model)


def test_training_with_equinox_and_optax(standard_promotion: None) -> None:
    eqx = pytest.importorskip("equinox")
    from spdnn_jax.nn.equinox import SparseLinear

    start, target = layers_and_target()
    model = eqx.nn.Sequential([SparseLinear(start[0], activation=Clip.relu()), SparseLinear(start[1])])
    optimizer = optax.adam(0.02)
    state = optimizer.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model: Any, state: Any) -> tuple[Any, Any, jax.Array]:
        loss, gradient = eqx.filter_value_and_grad(lambda model: jnp.mean((model(Y) - target) ** 2))(model)
        updates, state = optimizer.update(gradient, state)
        return eqx.apply_updates(model, updates), state, loss

    losses = []
    for _ in range(150):
        model, state, loss = step(model, state)
        losses.append(float(loss))
    check_trained(start, list(model.layers), losses, model)
