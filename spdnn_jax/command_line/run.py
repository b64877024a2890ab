"""The command `run`: a network, from what the flags name to the report."""

import shlex
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import jax
import numpy as np

from spdnn_jax import _native, ops
from spdnn_jax.command_line import memory, options, own, profiling, report, sources, verify
from spdnn_jax.command_line.options import FLAGS
from spdnn_jax.command_line.progress import progress_bar, rounded
from spdnn_jax.distributed import hosts, pieces
from spdnn_jax.distributed.mesh import feature_mesh
from spdnn_jax.distributed.runner import Runner, Settings
from spdnn_jax.graph_challenge import networks
from spdnn_jax.network import SparseLayer
from spdnn_jax.plan import Plan, build_plan

_LONG_WORK = 1e13  # edges times features: some minutes on a few cores
_SAMPLE_OF_CORE = 64  # features that tell how long all take


def run(_: list[str]) -> int:
    """Runs a network, checks its categories and reports."""
    _require_flags()
    options.check_outputs("categories_out", "report_out")
    sources.find_inputs()
    seconds: dict[str, float] = {}
    _timed(seconds, "read", own.settle)
    labels = own.labels()
    truth = networks.read_categories(FLAGS.truth) if FLAGS.truth else None
    backend = _choose_backend()
    memory.check(backend)
    plan = _build_plan(seconds)
    share = _timed(seconds, "inputs", sources.read_features)
    if share.shape[1] != plan.inputs:
        raise ValueError(f"the features have {share.shape[1]} neurons, the network has {plan.inputs} inputs")
    if backend == "cuda":
        print(f"spdnn: {plan.summary(FLAGS.features).splitlines()[-1]}", file=sys.stderr)
    xla_or_native: ops.Backend = "xla" if backend == "xla" else "auto"
    if backend == "cpu":
        _say_time(plan, share)
    runner, settings = _runner(plan, share, xla_or_native)
    inference_seconds, alive, active = _infer(runner, share, seconds)
    profile = _profile(plan, share, backend, seconds) if FLAGS.profile_layers else None
    categories = networks.category_ids(alive)
    check = verify.check(
        share, alive, None if runner.streamed else lambda y0: np.asarray(ops.infer(plan, y0, backend=xla_or_native))
    )
    truth_text, matches = verify.compare(categories, truth)
    result = report.Report(
        network=_name(plan),
        neurons=FLAGS.neurons,
        layers=plan.layers,
        features=FLAGS.features,
        inputs=FLAGS.inputs,
        edges=plan.edges,
        device=report.device(),
        backend=backend,
        compress=FLAGS.compress,
        versions=report.versions(),
        command=shlex.join(["spdnn", *sys.argv[1:]]),
        seconds=seconds,
        inference_seconds=inference_seconds,
        active=active.sum(axis=0).tolist(),
        layer_edges=[int(edges) for edges in plan.layer_edges],
        multiplied_edges=[int(edges) for edges in plan.multiplied_edges],
        categories=len(categories),
        check=check.text,
        largest_difference=check.largest_difference,
        close_calls=check.close_calls,
        truth=truth_text,
        right=None if labels is None else verify.score(plan, share, labels, xla_or_native),
        profile=profile,
        devices=len(active),
        processes=jax.process_count(),
        active_of_devices=active.tolist() if len(active) > 1 else [],
        stream_layers=settings.stream_layers if runner.streamed else None,
        passes=runner.passes,
    )
    if hosts.is_first():
        _write(result, categories)
    return 0 if check.agrees and matches else 1


def _name(plan: Plan) -> str:
    if FLAGS.network:
        return f"{', '.join(FLAGS.network)}: {plan.layers} layers, {plan.inputs} inputs, {plan.outputs} outputs"
    return f"{FLAGS.neurons} x {plan.layers}, {FLAGS.weights} weights"


def _write(result: report.Report, categories: np.ndarray) -> None:
    if FLAGS.categories_out:
        networks.write_categories(FLAGS.categories_out, categories)
    if FLAGS.report_out:
        result.write(FLAGS.report_out)
    print(result.table())


def _require_flags() -> None:
    official = FLAGS.weights == "official" or FLAGS.inputs == "official"
    if official and not FLAGS.dataset_dir:
        options.reject("--weights=official and --inputs=official need --dataset_dir")
    if FLAGS.inputs == "mnist" and not FLAGS.mnist_dir:
        options.reject("--inputs=mnist needs --mnist_dir")
    own.require_flags()
    for name in ("stream_layers", "stream_features"):
        value = getattr(FLAGS, name)
        if value != "auto" and not (value.isdecimal() and int(value) > 0):
            options.reject(f"--{name} takes auto or a positive number, got {value!r}")
    if FLAGS.rebalance_after and FLAGS.stream_layers != "auto":
        options.reject("--rebalance_after is for weights that stay on the devices: drop it, or --stream_layers")
    if FLAGS.profile_layers and (FLAGS.devices or 1) * (FLAGS.num_processes or 1) > 1:
        options.reject("--profile_layers times one device: drop it, or --devices and --num_processes")


def _choose_backend() -> str:
    if FLAGS.backend == "cpu":
        jax.config.update("jax_platforms", "cpu")
    if FLAGS.backend in ("cpu", "xla"):
        return FLAGS.backend
    reason = _native.cuda_unavailable_reason()
    if reason is None:
        return "cuda"
    if FLAGS.backend == "cuda":
        raise ValueError(f"--backend=cuda cannot be used: {reason}")
    print(f"spdnn: running on the CPU: {reason}", file=sys.stderr)
    jax.config.update("jax_platforms", "cpu")
    return "cpu"


def _build_plan(seconds: dict[str, float]) -> Plan:
    read = 0.0

    def timed_layers() -> Iterator[SparseLayer]:
        nonlocal read
        layers = sources.open_layers()
        while True:
            start = time.perf_counter()
            layer = next(layers, None)
            read += time.perf_counter() - start
            if layer is None:
                return
            yield layer

    start = time.perf_counter()
    with progress_bar("building the plan", FLAGS.layers) as progress, jax.default_device(_host()):
        plan = build_plan(
            timed_layers(),
            activation=sources.activation(),
            compress=FLAGS.compress,
            kernel=FLAGS.kernel,
            precision=None,  # parts of a plan, as devices are given them, run on the kernels alone
            progress=progress,
        )
    seconds["read"] += read
    seconds["plan"] = time.perf_counter() - start - read
    return plan


def _host() -> Any:
    """Host memory, where a plan waits until it is known how much of it a device has room for."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to know of GPUs alone
        return None


def _timed(seconds: dict[str, float], name: str, function: Any, *arguments: Any) -> Any:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*arguments))
    seconds[name] = time.perf_counter() - start
    return result


def _runner(plan: Plan, share: np.ndarray, backend: ops.Backend) -> tuple[Runner, Settings]:
    count = FLAGS.devices if FLAGS.devices or jax.process_count() > 1 else 1
    mesh = feature_mesh(count)
    fit = pieces.fit(plan.table, FLAGS.features, share[:1].nbytes, mesh.size, pieces.memory_of(mesh))
    settings = Settings(
        stream_layers=fit.layers if FLAGS.stream_layers == "auto" else int(FLAGS.stream_layers),
        stream_features=fit.features if FLAGS.stream_features == "auto" else int(FLAGS.stream_features),
        rebalance_after=FLAGS.rebalance_after,
    )
    if fit.layers < plan.layers or fit.features < FLAGS.features:
        print(
            f"spdnn: device memory has room for {fit.layers:,} of {plan.layers:,} layers and {fit.features:,} of "
            f"{FLAGS.features:,} features at a time",
            file=sys.stderr,
        )
    return Runner(plan, mesh, FLAGS.features, settings, backend), settings


def _say_time(plan: Plan, share: np.ndarray) -> None:
    """How long an inference on the CPU will take, if that is long: told by some of the features."""
    sample = _SAMPLE_OF_CORE * _native.usable_cores()
    if len(share) < 2 * sample or len(share) * float(plan.multiplied_edges.sum()) < _LONG_WORK:
        return
    part = share[:: len(share) // sample][:sample]
    seconds: dict[str, float] = {}
    for name in ("compiled", "sample"):
        _timed(seconds, name, ops.categories, plan, part)
    whole = rounded(seconds["sample"] * len(share) / sample)
    print(f"spdnn: an inference will take about {whole}; {FLAGS.repeats + 1} will be made (--repeats)", file=sys.stderr)


def _infer(runner: Runner, share: np.ndarray, seconds: dict[str, float]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Seconds of each repeat, of the slowest process; the categories; active features by device and layer."""
    runner.place(share)
    _timed(seconds, "compile", runner.compile)
    repeats = []
    with progress_bar("inference", FLAGS.repeats + 1) as progress:
        results = runner.run()  # warm-up
        progress(1)
        for done in range(1, FLAGS.repeats + 1):
            hosts.meet(f"repeat {done}")
            start = time.perf_counter()
            runner.run()
            repeats.append(time.perf_counter() - start)
            progress(done + 1)
    repeats = hosts.gather(np.asarray(repeats, np.float32)).max(axis=0).tolist()
    seconds["inference"] = float(np.median(repeats))
    return repeats, *runner.fetch(results)


def _profile(plan: Plan, y0: np.ndarray, backend: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    with progress_bar("timing layers", plan.layers) as progress:
        layers = _timed(
            seconds, "profile", lambda: profiling.profile_layers(plan, y0, backend=backend, progress=progress)
        )
    return [asdict(layer) for layer in layers]
