"""The custom calls, made past all checks of Python: wrong shapes, dtypes, sizes and attributes end in an error.

The checks are those of both back ends (cuda_ext/ffi/arguments.h). A GPU cannot look at indices before it runs: one that
names no input is taken for the last, and no call is made here that changes the words of a plan.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spdnn_jax import Clip, Plan, _native, build_plan, infer, planner
from spdnn_jax._native import (
    CHAIN_DERIVATIVE_TARGET,
    CHAIN_TARGET,
    LAYER_TARGET,
    NETWORK_TARGET,
    PERMUTED_TARGET,
    SAMPLED_TARGET,
    core,
)
from spdnn_jax.layout import PlanTable
from tests.conftest import random_network

FEATURES = 3
REFUSED = (jax.errors.JaxRuntimeError, ValueError)  # JAX makes one or the other of a handler's error
DTYPES = ("float16", "int32", "uint32", "bool")


@dataclass(frozen=True)
class Call:
    """A custom call.

    Attributes:
        target: Its name.
        arguments: What it is given, by name.
        results: Shapes and dtypes of what it returns, by name.
        attributes: Its attributes.
        also: Changes that the target takes, as "name: change".
    """

    target: str
    arguments: Mapping[str, np.ndarray]
    results: Mapping[str, np.ndarray]
    attributes: Mapping[str, Any]
    also: frozenset[str] = field(default_factory=frozenset)

    def run(self, platform: str = "cpu") -> list[jax.Array]:
        """Makes the call on the first device of a platform, whichever is the default one."""
        shapes = [jax.ShapeDtypeStruct(result.shape, result.dtype) for result in self.results.values()]
        arguments = jax.device_put(list(self.arguments.values()), jax.local_devices(backend=platform)[0])
        return jax.block_until_ready(list(jax.ffi.ffi_call(self.target, shapes)(*arguments, **self.attributes)))


def calls() -> dict[str, Call]:
    """One good call of each target."""
    network = random_network(1, [40, 30, 10], activation=[Clip.relu(2), Clip.identity()])
    plan = build_plan(network, derivatives=True)
    assert plan.rows is not None
    first = network.layers[0]
    y0, y1 = np.ones((FEATURES, 40), np.float32), np.ones((FEATURES, 30), np.float32)
    last = np.ones((FEATURES, 10), np.float32)
    words, rows = np.asarray(plan.words), np.asarray(plan.rows.words)
    masks = np.zeros((FEATURES, plan.rows.table.mask_words), np.uint32)
    compressed = {"indptr": first.indptr.astype(np.int32), "indices": first.indices}
    values, bias = np.asarray(first.values), np.asarray(first.bias)
    table = {"table": plan.rows.table.records}
    return {
        "network": Call(
            NETWORK_TARGET,
            {"y0": y0, "words": words},
            {"activations": last, "alive": np.zeros(FEATURES, bool), "active": np.zeros(2, np.int32)},
            {"table": plan.table.records},
            frozenset({"y0: bool", "activations: empty", "active: empty"}),
        ),
        "layer": Call(
            LAYER_TARGET,
            {"y": y0, **compressed, "values": values, "bias": bias},
            {"result": y1},
            {"lower": np.float32(0), "upper": np.float32(2)},
            frozenset({"values: scalar", "bias: scalar", "y: axis 1 longer"}),  # inputs that no edge reads
        ),
        "sampled": Call(
            SAMPLED_TARGET,
            {"in": y0, "out": y1, **compressed},
            {"result": values},
            {},
            frozenset({"in: axis 1 longer"}),
        ),
        "permuted": Call(
            PERMUTED_TARGET, {"values": values, "order": np.arange(first.edges, dtype=np.int32)}, {"result": values}, {}
        ),
        "chain": Call(CHAIN_TARGET, {"y0": y0, "words": rows}, {"result": last, "masks": masks}, table),
        "derivative": Call(
            CHAIN_DERIVATIVE_TARGET,
            {"in": y0, "masks": masks, "words": rows},
            {"out": last},
            {**table, "transposed": np.bool_(False)},
        ),
        "transposed": Call(
            CHAIN_DERIVATIVE_TARGET,
            {"in": last, "masks": masks, "words": rows},
            {"out": y0},
            {**table, "transposed": np.bool_(True)},
        ),
    }


def cuda_calls() -> dict[str, Call]:
    """The same for the CUDA back end, whose calls have a workspace, and a schedule."""

    def with_workspace(call: Call, size: int) -> Call:
        results = {**call.results, "workspace": np.zeros(size, np.uint8)}
        also = call.also | {"workspace: axis 0 longer", "workspace: one axis more"}  # more than it needs
        return dataclasses.replace(call, results=results, also=also)

    made = calls()
    del made["permuted"]
    table = PlanTable(made["network"].arguments["words"])
    network = with_workspace(made["network"], _native.cuda_workspace_bytes(table.records, FEATURES))
    schedule = planner.schedule(table).records
    made["network"] = dataclasses.replace(network, attributes={**network.attributes, "schedule": schedule})
    inputs, outputs = (made["sampled"].arguments[name].shape[1] for name in ("in", "out"))
    edges = made["sampled"].arguments["indices"].size
    for name, of_inputs in (("layer", "y"), ("sampled", "in")):  # indices then name inputs that are not there
        made[name] = dataclasses.replace(made[name], also=made[name].also | {f"{of_inputs}: axis 1 shorter"})
    sizes = {"layer": _native.cuda_product_workspace_bytes, "sampled": _native.cuda_sampled_workspace_bytes}
    for name, size in sizes.items():
        made[name] = with_workspace(made[name], size(FEATURES, inputs, outputs, edges))
    for name in ("chain", "derivative", "transposed"):
        records, words = made[name].attributes["table"], made[name].arguments["words"].size
        made[name] = with_workspace(made[name], _native.cuda_chain_workspace_bytes(records, words, FEATURES))
    return made


def changed_arrays(array: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """An array with another dtype, another size along every axis, another rank."""
    for dtype in DTYPES:
        if dtype != array.dtype:
            yield dtype, np.ones(array.shape, dtype)
    for axis in range(array.ndim):
        shorter = np.delete(array, -1, axis)
        if array.shape[axis] > 1:  # else it is empty, which is another change
            yield f"axis {axis} shorter", shorter
        yield f"axis {axis} longer", np.concatenate([array, np.take(array, [0], axis)], axis)
    yield "empty", np.zeros((*array.shape[:-1], 0), array.dtype)
    yield "scalar", np.zeros((), array.dtype)
    yield "one axis more", np.stack([array, array])


def changed_attributes(value: Any) -> Iterator[tuple[str, Any]]:
    """An attribute that is cut short, empty, of another type, or says nothing sensible."""
    if np.ndim(value):
        yield "cut", value[:-1]
        yield "empty", value[:0]
        yield "zeros", np.zeros_like(value)
        yield "doubled", np.concatenate([value, value])
        yield "int32", value.astype(np.int32)
        yield "one number", np.int64(value[0])
    else:
        yield "int64", np.int64(value + 7)  # no equal number: JAX would take the program that it has for that
        if value.dtype == np.float32:
            yield "NaN", np.float32(np.nan)
            yield "beyond the other", np.float32(-3 if value > 0 else 3)
            yield "float64", np.float64(value + 0.7)


def changes(call: Call) -> Iterator[tuple[str, Call]]:
    """Everything that may be wrong with a call, one at a time."""
    for part in ("arguments", "results", "attributes"):
        entries: Mapping[str, Any] = getattr(call, part)
        for name, value in entries.items():
            for change, other in changed_attributes(value) if part == "attributes" else changed_arrays(value):
                yield f"{name}: {change}", dataclasses.replace(call, **{part: {**entries, name: other}})
            left = {key: kept for key, kept in entries.items() if key != name}
            yield f"{name}: missing", dataclasses.replace(call, **{part: left})


def taken(call: Call, platform: str) -> set[str]:
    """Changes of a call that a back end takes; none of them may crash it."""
    call.run(platform)
    found = set()
    for change, wrong in changes(call):
        if not any(result.size for result in wrong.results.values()):
            continue  # XLA drops a call without results
        with contextlib.suppress(*REFUSED):
            wrong.run(platform)
            found.add(change)
    call.run(platform)  # the device is none the worse
    return found


@pytest.mark.parametrize("name", calls())
def test_calls_past_the_checks_of_python(name: str) -> None:
    call = calls()[name]
    assert taken(call, "cpu") == call.also


@pytest.mark.parametrize("name", [name for name in calls() if name != "permuted"])
def test_cuda_calls_past_the_checks_of_python(name: str, cuda: None) -> None:
    call = cuda_calls()[name]
    assert taken(call, "gpu") == call.also


@pytest.mark.parametrize("number", [-1, 5, -(2**31), 2**31 - 1])
def test_an_order_that_names_no_value_is_refused(number: int, on_cpu: None) -> None:
    values, order = np.arange(5, dtype=np.float32), np.array([4, 3, 2, 0, 1], np.int32)
    (result,) = Call(PERMUTED_TARGET, {"values": values, "order": order}, {"result": values}, {}).run()
    np.testing.assert_array_equal(result, values[order])
    order[2] = number
    with pytest.raises(REFUSED, match="names an edge that does not exist"):
        Call(PERMUTED_TARGET, {"values": values, "order": order}, {"result": values}, {}).run()


@pytest.mark.parametrize("name", [name for name, code in core.rows_fields() if code == "<i8"])
def test_records_of_rows_that_lie_are_refused(name: str, on_cpu: None) -> None:
    call = calls()["derivative"]
    fields = [field for field, _ in core.rows_fields()]
    records = call.attributes["table"].reshape(-1, len(fields))
    for value in (-1, 8, 1 << 40, -(1 << 62)):
        wrong = records.copy()
        wrong[1, fields.index(name)] = value
        with pytest.raises(REFUSED, match="spdnn_jax: "):
            dataclasses.replace(call, attributes={**call.attributes, "table": wrong.ravel()}).run()


def with_derivatives() -> tuple[Plan, np.ndarray]:
    return build_plan(random_network(1, [40, 30, 10]), derivatives=True), np.ones((FEATURES, 40), np.float32)


@pytest.mark.parametrize("fill", [0xFFFFFFFF, 0x00FF00FF, 0x7F800000])
def test_words_for_derivatives_changed_in_memory_are_refused(fill: int, on_cpu: None) -> None:
    plan, y0 = with_derivatives()
    assert plan.rows is not None
    wrong = dataclasses.replace(plan.rows, words=jnp.full_like(plan.rows.words, fill))
    for derivative in (
        jax.grad(lambda y: infer(plan, y).sum()),
        lambda y: jax.jvp(lambda y: infer(plan, y), (y,), (y,)),
    ):
        derivative(y0)
    plan = dataclasses.replace(plan, rows=wrong)
    for derivative in (
        jax.grad(lambda y: infer(plan, y).sum()),
        lambda y: jax.jvp(lambda y: infer(plan, y), (y,), (y,)),
    ):
        with pytest.raises(REFUSED, match="words for a plan's derivatives were changed"):
            jax.block_until_ready(derivative(y0))


def test_no_rows_are_made_of_changed_words(on_cpu: None) -> None:
    plan, _ = with_derivatives()
    wrong = Plan(jnp.full_like(plan.words, 0x00FF00FF), plan.table)
    with pytest.raises(ValueError, match="an index names an input that the layer does not have"):
        wrong.with_derivatives()


def test_no_damaged_word_for_derivatives_crashes(on_cpu: None) -> None:
    """Each of them, backwards, where indices and starts of rows are written by."""
    call = calls()["transposed"]
    words, refused = call.arguments["words"], 0
    run = jax.jit(
        lambda words: jax.ffi.ffi_call(call.target, [jax.ShapeDtypeStruct((FEATURES, 40), jnp.float32)])(
            call.arguments["in"], call.arguments["masks"], words, **call.attributes
        )
    )
    for position in range(0, words.size, 3):
        damaged = words.copy()
        damaged[position] = 0x7FFFFFF0
        try:
            jax.block_until_ready(run(damaged))
        except REFUSED as error:
            assert "were changed since it was built" in str(error)
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("name", "damaged"),
    [("layer", "indptr"), ("layer", "indices"), ("sampled", "indptr"), ("sampled", "indices"), ("transposed", "words")],
)
def test_a_gpu_survives_indices_that_name_nothing(name: str, damaged: str, cuda: None) -> None:
    """One by one, and all at once; some result comes, and the next call's is right."""
    call = cuda_calls()[name]
    good, before = np.asarray(call.arguments[damaged]), np.asarray(call.run("gpu")[0])
    for wrong in (0x7FFFFFF0, -1):
        for position in (*range(0, good.size, 7), slice(None)):
            changed = good.view(np.int32).copy()
            changed[position] = wrong
            dataclasses.replace(call, arguments={**call.arguments, damaged: changed.view(good.dtype)}).run("gpu")
    np.testing.assert_array_equal(call.run("gpu")[0], before)
