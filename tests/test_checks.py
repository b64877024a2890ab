"""Every way in, with what it takes and what it does not: converted right, or refused by name before anything runs."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse
from jax.experimental import sparse
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spdnn_jax import (
    Clip,
    SparseLayer,
    SparseNetwork,
    apply,
    build_plan,
    categories,
    checks,
    feature_mesh,
    infer,
    infer_sharded,
    layer,
    replicate,
)
from spdnn_jax.ops import Backend
from spdnn_jax.simplify import simplify
from tests.conftest import dense_reference, random_network

NETWORK = random_network(0, [12, 10], bias="vector")
LAYER = NETWORK.layers[0]
PLAN = build_plan(NETWORK)
Y = np.random.default_rng(0).integers(-2, 6, (8, 12))
DENSE = np.eye(3, dtype=np.float32)

# --- entries and the ways to call them --------------------------------------------------------------------------------

RUN: dict[str, Callable[[Any, Backend], jax.Array]] = {
    "infer": lambda y, backend: infer(PLAN, y, backend=backend),
    "layer": lambda y, backend: layer(LAYER, y, backend=backend),
    "apply": lambda y, backend: apply(NETWORK, y, backend=backend),
}
runs = pytest.mark.parametrize("run", RUN.values(), ids=RUN)
backends = pytest.mark.parametrize("backend", ["auto", "xla"])

Call = Callable[[Callable[[Any], jax.Array], np.ndarray], Any]


def _plain(run: Any, y: np.ndarray) -> Any:
    return run(y)


def _jit(run: Any, y: np.ndarray) -> Any:
    return jax.jit(run)(y)


def _disable_jit(run: Any, y: np.ndarray) -> Any:
    with jax.disable_jit():
        return run(y)


def _empty_vmap(run: Any, y: np.ndarray) -> Any:
    nothing = jax.vmap(run)(jnp.asarray(y[:0].reshape(0, *y.shape)))
    assert nothing.shape == (0, 8, 10)
    return jax.vmap(run)(y[None])[0]


def _x64(run: Any, y: np.ndarray) -> Any:
    with jax.enable_x64(True):
        return run(jnp.asarray(y))


def _x64_traced(run: Any, y: np.ndarray) -> Any:
    with jax.enable_x64(True):
        return jax.jit(run)(y)


def _mesh() -> jax.sharding.Mesh:
    """An explicit one, of four devices where there are so many: a machine may have one GPU."""
    return jax.make_mesh((min(4, jax.device_count()),), ("features",))


def _explicit(run: Any, y: np.ndarray) -> Any:
    result = jax.jit(run)(jax.device_put(y, NamedSharding(_mesh(), P("features"))))
    assert result.sharding.spec[0] == "features"
    return result


def _explicit_in_context(run: Any, y: np.ndarray) -> Any:
    with jax.set_mesh(_mesh()):
        return run(y)


CALLS: dict[str, Call] = {
    "plain": _plain,
    "jit": _jit,
    "disable_jit": _disable_jit,
    "empty vmap": _empty_vmap,
    "x64": _x64,
    "x64, traced": _x64_traced,
    "Explicit mesh": _explicit,
    "Explicit mesh in context": _explicit_in_context,
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


# --- features ---------------------------------------------------------------------------------------------------------


@runs
@backends
@calls
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "int8", "int64", "bool"])
def test_features_of_every_dtype_however_called(run: Any, backend: Backend, call: Call, dtype: str) -> None:
    y = Y.astype(jnp.dtype(dtype))
    result = call(lambda y: run(y, backend), y)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, dense_reference(NETWORK, y.astype(np.float64)), atol=1e-5)


WRONG_FEATURES: dict[str, tuple[Any, str]] = {
    "None": (None, "features must be an array, got None"),
    "text": ("features", "features must be an array, got a str"),
    "SciPy": (scipy.sparse.csr_array(Y), r"got a SciPy matrix \(8, 12\): call .toarray\(\) first"),
    "BCOO": (sparse.BCOO.fromdense(jnp.ones((8, 12))), r"got a BCOO: call .todense\(\) first"),
    "dict": ({"y": Y}, "features must be an array of numbers, got a dict"),
    "ragged": ([[1], [1, 2]], "features must be an array, got a list"),
    "network": (NETWORK, "features must be an array"),
    "complex": (Y + 1j, "features must be real numbers, got complex"),
    "text array": (np.full((8, 12), "a"), "features must be real numbers, got <U1"),
    "dates": (np.zeros((8, 12), "datetime64[s]"), "features must be real numbers, got datetime64"),
    "masked": (np.ma.masked_array(Y), "without a mask"),
    "narrow": (Y[:, :11], r"must have shape \(features, 12\).*got \(8, 11\)"),
    "number": (1.0, r"must have shape .*got \(\)"),
    "counts": (Y.astype(np.uint32), "convert counts to int32"),
    "overflow": (np.full((8, 12), 1e300), r"features: number 0 is 1e\+300, out of the range of float32"),
}


@runs
@backends
@pytest.mark.parametrize("call", [_plain, _jit, _disable_jit, _x64, _explicit_in_context])
@pytest.mark.parametrize(("wrong", "message"), WRONG_FEATURES.values(), ids=WRONG_FEATURES)
def test_wrong_features_are_named(run: Any, backend: Backend, call: Any, wrong: Any, message: str) -> None:
    def with_wrong(y: Any) -> jax.Array:
        del y
        return run(wrong, backend)

    with pytest.raises(ValueError, match=message):
        call(with_wrong, Y)


@pytest.mark.parametrize("run", [infer, categories, lambda plan, y: infer_sharded(plan, y, feature_mesh())])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (NETWORK, "got a SparseNetwork: call build_plan on it first"),
        (LAYER, r"got a SparseLayer: call build_plan\(\[layer\]\) first"),
        (Y, "the plan comes first"),
        (None, "a Plan is expected, got None"),
        (jax.tree.map(lambda _: None, PLAN), "the plan's words must be an array, got None"),
    ],
)
def test_what_is_no_plan_is_named(run: Any, wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(wrong, Y.astype(np.float32))
    with pytest.raises(ValueError, match=message):
        jax.jit(lambda y: run(wrong, y))(Y.astype(np.float32))


def test_replicate_wants_a_plan() -> None:
    with pytest.raises(ValueError, match="call build_plan"):
        replicate(NETWORK, feature_mesh())  # pyright: ignore[reportArgumentType]


def test_networks_and_plans_are_not_mixed_up() -> None:
    for wrong, message in ((PLAN, "got a Plan: call infer"), (LAYER, "got a SparseLayer"), (None, "got None")):
        with pytest.raises(ValueError, match=message):
            apply(wrong, Y)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="got a Plan, which is built already"):
        build_plan(PLAN)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="pass one of its layers, or call"):
        layer(NETWORK, Y)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="a SparseNetwork is expected, got a Plan"):
        simplify(PLAN)  # pyright: ignore[reportArgumentType]


# --- matrices ---------------------------------------------------------------------------------------------------------

MATRICES: dict[str, tuple[Any, str]] = {  # what it is, and the builder that takes it
    "csr": (scipy.sparse.csr_array(DENSE), "from_scipy"),
    "csc matrix": (scipy.sparse.csc_matrix(DENSE), "from_scipy"),
    "dia": (scipy.sparse.dia_array(DENSE), "from_scipy"),
    "bool coo": (scipy.sparse.coo_array(DENSE.astype(bool)), "from_scipy"),
    "BCOO": (sparse.BCOO.fromdense(jnp.asarray(DENSE)), "from_bcoo"),
    "BCSR": (sparse.BCSR.fromdense(jnp.asarray(DENSE)), "from_bcoo"),
    "numpy": (DENSE, "from_dense"),
    "int64": (DENSE.astype(np.int64), "from_dense"),
    "bfloat16": (jnp.asarray(DENSE, jnp.bfloat16), "from_dense"),
    "list": (DENSE.tolist(), "from_dense"),
}
matrices = pytest.mark.parametrize(("matrix", "takes"), MATRICES.values(), ids=MATRICES)


@matrices
@pytest.mark.parametrize("builder", ["from_scipy", "from_bcoo", "from_dense"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, jax.disable_jit, lambda: jax.enable_x64(True)])
def test_every_builder_with_every_matrix(matrix: Any, takes: str, builder: str, mode: Any) -> None:
    with mode():
        build = getattr(SparseLayer, builder)
        if builder != takes:
            with pytest.raises(ValueError, match=f"SparseLayer.{builder} takes .*: use SparseLayer.{takes}"):
                build(matrix)
            return
        for bias in (None, 0, np.zeros(3), jnp.zeros(3, jnp.bfloat16), [0, 0, 0]):
            built = build(matrix, bias)
            np.testing.assert_array_equal(built.to_scipy().toarray(), DENSE)
            assert not np.asarray(built.bias).any()
            assert [leaf.dtype for leaf in jax.tree.leaves(built)] == [np.int32, np.int32, np.float32, np.float32]
            assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(built))


@matrices
def test_a_scipy_matrix_is_a_layer_and_no_other_is(matrix: Any, takes: str) -> None:
    y = np.arange(6, dtype=np.float32).reshape(2, 3)
    entries = [
        lambda: infer(build_plan([matrix]), y),
        lambda: infer(build_plan(iter([matrix])), y),
        lambda: apply(SparseNetwork([matrix]), y),
        lambda: layer(matrix, y),
    ]
    for entry in entries:
        if takes == "from_scipy":
            np.testing.assert_array_equal(entry(), y)
        else:
            with pytest.raises(ValueError, match=f"(the layer|layer 1) must be .*: build it with SparseLayer.{takes}"):
                entry()


@pytest.mark.parametrize("wrong", [None, 3, "path", PLAN, LAYER, scipy.sparse.csr_array(DENSE), {"a": LAYER}])
@pytest.mark.parametrize("entry", [SparseNetwork, build_plan])
def test_layers_come_in_a_list(wrong: Any, entry: Any) -> None:
    with pytest.raises(ValueError, match=r"the layers must come as a list|got a Plan, which is built already"):
        entry(wrong)


@pytest.mark.parametrize("builder", ["from_scipy", "from_bcoo", "from_dense"])
@pytest.mark.parametrize("wrong", [None, "matrix", LAYER, NETWORK, object()])
def test_what_is_no_matrix_is_named(builder: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"SparseLayer\.from_|the weights must be"):
        getattr(SparseLayer, builder)(wrong)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        (1e300, 0, r"values: number 0 is 1e\+300, out of the range of float32"),
        (1.0, 1e300, r"bias: number 0 is 1e\+300, out of the range of float32"),
        (np.nan, 0, "weight 0 is nan"),
        (1.0, np.inf, "bias 0 is inf"),
        (1.0, [0, 0], r"bias must have shape \(\) or \(3,\), got \(2,\)"),
        (1.0, "bias", "bias must be an array, got a str"),
        (1.0, 1j, "bias must be real numbers, got complex128"),
        (1j, 0, "weights must be real numbers, got complex128"),
    ],
)
def test_weights_and_biases_out_of_range(weight: Any, bias: Any, message: str) -> None:
    matrix = np.eye(3) * weight
    for build in (SparseLayer.from_dense, lambda m, b: SparseLayer.from_scipy(scipy.sparse.csr_array(m), b)):
        with pytest.raises(ValueError, match=message):
            build(matrix, bias)


def test_matrices_too_wide_for_an_index_are_refused() -> None:
    with pytest.raises(ValueError, match="the number of neurons must be a whole number from 0 to 2147483647"):
        SparseLayer.from_scipy(scipy.sparse.coo_array(([1.0], ([2**32 + 1], [0])), shape=(2**32 + 2, 1)))


def test_builders_inside_jit_say_so() -> None:
    with pytest.raises(ValueError, match="is traced"):
        jax.jit(lambda m: (SparseLayer.from_dense(m), 0)[1])(DENSE)
    with pytest.raises(ValueError, match="is traced"):
        jax.jit(lambda network: (build_plan(network), 0)[1])(NETWORK)


# --- raw layers -------------------------------------------------------------------------------------------------------

RAW: dict[str, Any] = {
    "indptr": np.array([0, 1, 2, 2]),
    "indices": np.array([0, 2]),
    "values": np.array([1.0, 2.0]),
    "bias": np.zeros(3),
    "inputs": 3,
}
USES: dict[str, Callable[[SparseLayer], Any]] = {
    "validate": lambda raw: raw.validate(),
    "build_plan": lambda raw: build_plan([raw]),
    "simplify": lambda raw: simplify(SparseNetwork([raw])),
    "layer": lambda raw: layer(raw, np.ones((2, 3), np.float32)),
    "layer, xla": lambda raw: layer(raw, np.ones((2, 3), np.float32), backend="xla"),
    "apply": lambda raw: apply(SparseNetwork([raw]), np.ones((2, 3), np.float32)),
}
uses = pytest.mark.parametrize("use", USES.values(), ids=USES)
FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"indptr": None}, "indptr must be an array, got None"),
    ({"indices": None}, "indices must be an array, got None"),
    ({"values": None}, "values must be an array, got None"),
    ({"bias": None}, "bias must be an array, got None"),
    ({"indptr": np.array([0.0, 1, 2, 2])}, "indptr must be integers, got float64"),
    ({"indices": np.array([0.0, 2])}, "indices must be integers, got float64"),
    ({"indices": np.array([False, True])}, "indices must be integers, got bool"),
    ({"indices": np.array([[0, 2]])}, r"indices must have shape \(any,\), got \(1, 2\)"),
    ({"indices": np.array([0, 3])}, "names input 3|reads input neuron 3"),
    ({"indices": np.array([-1, 2])}, "names input -1|reads input neuron -1"),
    ({"indices": np.array([0, 2**32 + 1])}, "indices: number 1 is 4294967297, out of the range of int32"),
    ({"indices": np.array([0, 2**31], np.uint32)}, "indices: number 1 is 2147483648, out of the range of int32"),
    ({"indptr": np.array([0, 1, 2, 2**32 + 2])}, "indptr: number 3 is 4294967298, out of the range of int32"),
    ({"indptr": np.array([0, 2, 1, 2])}, "indptr must rise"),
    ({"indptr": np.array([0, 1, 2, 1])}, "indptr must rise"),
    ({"indptr": np.array([], int)}, r"indptr must have shape \(outputs \+ 1,\)"),
    ({"values": np.array([1.0, 1e300])}, r"values: number 1 is 1e\+300, out of the range of float32"),
    ({"values": np.array([1.0])}, r"values must have shape \(\) or \(2,\), got \(1,\)"),
    ({"values": np.array([1j, 2])}, "values must be real numbers, got complex128"),
    ({"values": np.array(["a", "b"])}, "values must be real numbers"),
    ({"bias": np.zeros(2)}, r"bias must have shape \(\) or \(3,\), got \(2,\)"),
    ({"bias": np.array(-1e300)}, r"bias: number 0 is -1e\+300, out of the range of float32"),
    ({"inputs": 3.0}, "inputs must be a whole number, got 3.0"),
    ({"inputs": -3}, "inputs must be a whole number from 0 to"),
    ({"inputs": 2**31}, "inputs must be a whole number from 0 to 2147483647, got 2147483648"),
    ({"inputs": True}, "inputs must be a whole number, got True"),
    ({"inputs": None}, "inputs must be a whole number, got None"),
]


@uses
@pytest.mark.parametrize("mode", [contextlib.nullcontext, jax.disable_jit, lambda: jax.enable_x64(True)])
@pytest.mark.parametrize("container", [np.asarray, jnp.asarray])
@pytest.mark.parametrize(("change", "message"), FIELDS, ids=[str(k) for k in range(len(FIELDS))])
def test_malformed_raw_layers_are_named(use: Any, mode: Any, container: Any, change: Any, message: str) -> None:
    (field, wrong), *_ = change.items()
    with mode():
        if isinstance(wrong, np.ndarray) and wrong.dtype.kind != "U":
            held = container(wrong)
            if held.dtype.kind not in "fiu" or not np.array_equal(np.asarray(held).astype(wrong.dtype), wrong):
                held = wrong  # what JAX cannot hold without 64 bits
            change = {field: held}
        with pytest.raises(
            ValueError, match=message.replace("float64", "float(32|64)").replace("complex128", "complex")
        ):
            use(SparseLayer(**(RAW | change)))


@uses
@pytest.mark.parametrize("mode", [contextlib.nullcontext, jax.disable_jit, lambda: jax.enable_x64(True)])
@pytest.mark.parametrize(
    ("floats", "ints"),
    [(np.float64, np.int64), (np.float16, np.uint64), (jnp.bfloat16, np.int8), (np.int64, np.uint32), (bool, np.int32)],
)
@pytest.mark.parametrize("container", [np.asarray, jnp.asarray])
def test_raw_layers_of_other_dtypes_are_converted(use: Any, mode: Any, floats: Any, ints: Any, container: Any) -> None:
    with mode():
        arrays = {k: container(RAW[k].astype(ints)) for k in ("indptr", "indices")}
        arrays |= {k: container(RAW[k].astype(floats)) for k in ("values", "bias")}
        raw = SparseLayer(**arrays, inputs=3)
        use(raw)
        result = np.asarray(layer(raw, np.ones((1, 3), np.float32)))
        np.testing.assert_array_equal(result[0], [*np.asarray(arrays["values"], np.float32), 0])


@pytest.mark.parametrize("backend", ["auto", "xla"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": np.zeros(2)}, "indices must be integers"),
        ({"indptr": np.zeros(4)}, "indptr must be integers"),
        ({"values": np.zeros(3)}, r"values must have shape \(\) or \(2,\)"),
        ({"values": np.zeros(2, complex)}, "values must be real numbers"),
        ({"bias": np.zeros(2)}, r"bias must have shape \(\) or \(3,\)"),
    ],
)
def test_traced_layers_are_refused_when_traced(backend: Backend, change: Any, message: str) -> None:
    raw = SparseLayer(**(RAW | change))
    for x64 in (False, True):
        with jax.enable_x64(x64), pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda raw, y: layer(raw, y, backend=backend), raw, jnp.ones((2, 3), jnp.float32))


@backends
def test_traced_layers_of_other_dtypes_are_converted(backend: Backend) -> None:
    """Under x64 a layer from raw NumPy arrays is int64 and float64 throughout; the kernels are not."""
    with jax.enable_x64(True):
        run = jax.jit(lambda raw, y: layer(raw, y, backend=backend))
        result = run(SparseLayer(**RAW), np.ones((1, 3)))
        np.testing.assert_array_equal(result[0], [1, 2, 0])
        gradient = jax.grad(lambda values: run(SparseLayer(**(RAW | {"values": values})), np.ones((1, 3))).sum())(
            RAW["values"]
        )
        assert gradient.dtype == np.float64


def test_a_device_s_array_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading indices back from a GPU at every call would cost more than the layer."""
    read: list[Any] = []
    fields: dict[str, Any] = {k: jnp.asarray(v) if k != "inputs" else v for k, v in RAW.items()}
    raw = SparseLayer(**fields)
    y = np.ones((2, 3), np.float32)
    layer(raw, y)
    monkeypatch.setattr(checks.np, "asarray", lambda array, *_: read.append(array))
    layer(raw, y)
    assert not read


# --- caps and counts --------------------------------------------------------------------------------------------------

CAPPED: dict[str, Callable[[Any], Any]] = {
    "Clip.relu": Clip.relu,
    "SparseNetwork": lambda cap: SparseNetwork([LAYER], cap=cap),
    "build_plan": lambda cap: build_plan([LAYER], cap=cap),
    "layer": lambda cap: layer(LAYER, Y, cap=cap),
    "layer, xla": lambda cap: layer(LAYER, Y, cap=cap, backend="xla"),
}


@pytest.mark.parametrize("entry", CAPPED.values(), ids=CAPPED)
@pytest.mark.parametrize("cap", [np.ones(3), jnp.float32(1), np.array(1.0), np.nan, 0, 0.0, -0.0, -1, "1", True, 1e300])
def test_a_cap_is_a_positive_number(entry: Any, cap: Any) -> None:
    with pytest.raises(ValueError, match="cap must be"):
        entry(cap)


@pytest.mark.parametrize("entry", CAPPED.values(), ids=CAPPED)
def test_a_traced_cap_is_refused(entry: Any) -> None:
    with pytest.raises(ValueError, match="cap must be a number that is known when the program is written"):
        jax.jit(lambda cap: (entry(cap), 0)[1])(1.0)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, 2.0, "2", True, np.ones(2), None])
def test_counts_are_whole_numbers(wrong: Any) -> None:
    with pytest.raises(ValueError, match="the layers of a part must be a whole number"):
        PLAN.split(wrong)
    if wrong is not None:
        with pytest.raises(ValueError, match="threads must be a whole number"):
            build_plan(NETWORK, threads=wrong)


@pytest.fixture(autouse=True)
def _cpu(on_cpu: None) -> Iterator[None]:
    yield


def test_replaced_fields_are_looked_at_again() -> None:
    """What was looked at once is the array, not the layer."""
    layer(LAYER, Y)
    with pytest.raises(ValueError, match="names input"):
        layer(dataclasses.replace(LAYER, inputs=5), Y[:, :5])
