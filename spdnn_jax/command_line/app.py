"""spdnn [run | convert | download | bench FLAGFILE... | plot REPORT...] [flags]; without a command: run."""

import itertools
import shlex
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import app, flags, logging

from spdnn_jax import _native, ops, planner, simplify
from spdnn_jax.command_line import profiling, report
from spdnn_jax.distributed import hosts, pieces
from spdnn_jax.distributed.mesh import feature_mesh, share_of_process
from spdnn_jax.distributed.runner import Runner, Settings
from spdnn_jax.graph_challenge import download, inputs, networks, official_files, oracle, radixnet
from spdnn_jax.network import NetworkFile, SparseLayer
from spdnn_jax.plan import Plan, build_plan

_SAMPLE = 1000  # features of --check=sample
_ORACLE_BYTES = 1 << 31  # of float64 activations that the oracle holds at a time

FLAGS = flags.FLAGS
flags.DEFINE_integer("neurons", 1024, "Neurons of a layer: 16 * 2^k; 1024, 4096, 16384 or 65536 in the challenge.", 1)
flags.DEFINE_integer("layers", 120, "Number of layers: 120, 480 or 1920 in the challenge.", 1)
flags.DEFINE_enum("weights", "radixnet", ["radixnet", "official"], "Generated weights, or those in --dataset_dir.")
flags.DEFINE_string("dataset_dir", None, "Folder of the official files, or a network file that spdnn convert wrote.")
flags.DEFINE_enum("inputs", "digits", ["digits", "mnist", "official", "random"], "Where the features come from.")
flags.DEFINE_string("mnist_dir", None, "Folder of the MNIST files in IDX form, for --inputs=mnist.")
flags.DEFINE_integer("features", networks.FEATURES, "Number of features.", 1)
flags.DEFINE_integer("seed", 0, "Of generated weights and inputs.", 0)
flags.DEFINE_enum(
    "backend", "auto", ["auto", "cuda", "cpu", "xla"], "Back end; auto: cuda where it can be used, else cpu."
)
flags.DEFINE_enum(
    "compress", "none", list(simplify.COMPRESS), "Lossless compression: of equal neurons; full: of equal features, too."
)
flags.DEFINE_enum("kernel", "auto", list(planner.KERNELS), "CUDA kernel family; auto: the planner picks.")
flags.DEFINE_integer("devices", None, "Devices that share the features; by default 1, with several processes all.", 1)
flags.DEFINE_integer("rebalance_after", 0, "Layers after which survivors are dealt anew, if that pays; 0: never.", 0)
flags.DEFINE_string("stream_layers", "auto", "Layers of weights on a device at a time; auto: all, if they fit.")
flags.DEFINE_string("stream_features", "auto", "Features on the devices at a time; auto: all, if they fit.")
flags.DEFINE_string("coordinator_address", None, "host:port of process 0, of several; auto: from Slurm or Open MPI.")
flags.DEFINE_integer("num_processes", None, "Number of processes, with --coordinator_address.", 1)
flags.DEFINE_integer("process_id", None, "Number of this process, from 0.", 0)
flags.DEFINE_integer("lost_after", 60, "Seconds without a sign of life from a process that end all others.", 1)
flags.DEFINE_integer("repeats", 5, "Timed inferences, after one that is not timed.", 1)
flags.DEFINE_bool("profile_layers", False, "Time each layer alone, in a separate run that waits after every layer.")
flags.DEFINE_enum(
    "check", "sample", ["none", "sample", "full"], f"Features checked against the oracle: none, {_SAMPLE}, all."
)
flags.DEFINE_string("truth", None, "Truth file to compare the categories with; the exit code is 1 where they differ.")
flags.DEFINE_string("categories_out", None, "Where to write the categories, in the form of the truth files.")
flags.DEFINE_string("report_out", None, "Where to write the report as JSON.")
flags.DEFINE_enum(
    "figure", "layers", ["layers", "networks"], "What plot draws: the layers of the runs, or the time of each network."
)
flags.DEFINE_string("output", None, "The file that convert or plot writes.")
flags.DEFINE_string("base_url", download.BASE_URL, "Where download finds the official files.")


def main() -> NoReturn:
    """The console script `spdnn`."""
    logging.set_verbosity(logging.WARNING)  # libraries log through absl, too
    for flag in FLAGS.get_key_flags_for_module(__name__):  # --help shows those of the program, a script without flags
        FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    sys.modules["__main__"].__doc__ = __doc__  # the head of --help
    app.run(_main, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    try:
        return FLAGS(arguments)
    except (flags.Error, OSError) as error:
        print(f"FATAL Flags parsing error: {error}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(2)


def _main(arguments: list[str]) -> int:
    commands = {"run": _run, "convert": _convert, "download": _download, "bench": _bench, "plot": _plot}
    name, *rest = arguments[1:] or ["run"]
    if name not in commands:
        _reject(f"there is no command {name!r}: choose one of {', '.join(commands)}")
    if rest and name not in ("bench", "plot"):
        _reject(f"spdnn {name} takes flags only, found {rest[0]!r}")
    try:
        return _in_step(commands[name], rest)
    except (ValueError, OSError, ImportError) as error:
        return _fail(_one_line(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _one_line(error) or "the host has too little"
        return _fail(f"out of memory: {needed}: lower --stream_features, --stream_layers, or --features")
    except KeyboardInterrupt:
        print("spdnn: interrupted", file=sys.stderr)
        return 130  # as a shell reports it


def _in_step(command: Callable[[list[str]], int], rest: list[str]) -> int:
    """Runs a command; where several processes run it, one that fails does not keep the others waiting."""
    if not FLAGS.coordinator_address:
        return command(rest)
    hosts.join(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, FLAGS.lost_after)
    try:
        return command(rest)
    except jax.errors.JaxRuntimeError as error:
        _leave(f"lost contact with another process, or with a device: {_one_line(error)}")
    except (ValueError, OSError, ImportError, MemoryError) as error:
        _leave(_one_line(error))
    except (Exception, KeyboardInterrupt):
        traceback.print_exc()
        _leave("this process ends, and the others with it")


def _leave(message: str) -> NoReturn:
    hosts.leave(_fail(f"process {jax.process_index()}: {message}"))


def _fail(message: str) -> int:
    print(f"spdnn: error: {message}", file=sys.stderr)
    return 1


def _reject(message: str) -> NoReturn:
    print(f"FATAL Flags parsing error: {message}\nPass --help for the flags.", file=sys.stderr)
    sys.exit(2)


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}: check the path and its permissions"
    return " ".join(str(error).split())


# --- run --------------------------------------------------------------------------------------------------------------


def _run(_: list[str]) -> int:
    _require_flags()
    _check_writable(FLAGS.categories_out, FLAGS.report_out)
    _find_inputs()
    truth = networks.read_categories(FLAGS.truth) if FLAGS.truth else None
    backend = _choose_backend()
    seconds: dict[str, float] = {}
    plan = _build_plan(seconds)
    share = _timed(seconds, "inputs", _read_features)
    if share.shape[1] != plan.inputs:
        raise ValueError(f"the features have {share.shape[1]} neurons, the network has {plan.inputs} inputs")
    if backend == "cuda":
        print(f"spdnn: {plan.summary(FLAGS.features).splitlines()[-1]}", file=sys.stderr)
    runner, settings = _runner(plan, share, "xla" if backend == "xla" else "auto")
    inference_seconds, alive, active = _infer(runner, share, seconds)
    profile = _profile(plan, share, backend, seconds) if FLAGS.profile_layers else None
    categories = networks.category_ids(alive)
    check, agrees = _check(share, alive)
    truth_text, matches = _compare(categories, truth)
    result = report.Report(
        network=f"{FLAGS.neurons} x {plan.layers}, {FLAGS.weights} weights",
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
        check=check,
        truth=truth_text,
        profile=profile,
        devices=len(active),
        processes=jax.process_count(),
        active_of_devices=active.tolist() if len(active) > 1 else [],
        stream_layers=settings.stream_layers if runner.streamed else None,
        passes=runner.passes,
    )
    if hosts.is_first():
        _write(result, categories)
    return 0 if agrees and matches else 1


def _write(result: report.Report, categories: np.ndarray) -> None:
    if FLAGS.categories_out:
        networks.write_categories(FLAGS.categories_out, categories)
    if FLAGS.report_out:
        result.write(FLAGS.report_out)
    print(result.table())


def _require_flags() -> None:
    official = FLAGS.weights == "official" or FLAGS.inputs == "official"
    if official and not FLAGS.dataset_dir:
        _reject("--weights=official and --inputs=official need --dataset_dir")
    if FLAGS.inputs == "mnist" and not FLAGS.mnist_dir:
        _reject("--inputs=mnist needs --mnist_dir")
    for name in ("stream_layers", "stream_features"):
        value = getattr(FLAGS, name)
        if value != "auto" and not (value.isdecimal() and int(value) > 0):
            _reject(f"--{name} takes auto or a positive number, got {value!r}")
    if FLAGS.rebalance_after and FLAGS.stream_layers != "auto":
        _reject("--rebalance_after is for weights that stay on the devices: drop it, or --stream_layers")
    if FLAGS.profile_layers and (FLAGS.devices or 1) * (FLAGS.num_processes or 1) > 1:
        _reject("--profile_layers times one device: drop it, or --devices and --num_processes")


def _check_writable(*paths: str | None) -> None:
    """Says so before a long run, not after it, where a result could not be written."""
    for path in filter(None, paths):
        folder = Path(path).resolve().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"{path} cannot be written: the folder {folder} does not exist; make it first")
        try:
            if Path(path).is_dir():
                raise IsADirectoryError
            tempfile.TemporaryFile(dir=folder).close()  # os.access says yes to root, even where nothing can be written
        except OSError:
            raise PermissionError(
                f"{path} cannot be written: choose another place, or change the permissions"
            ) from None


def _find_inputs() -> None:
    """Says so before the plan is built, not after it, where the inputs are missing."""
    if FLAGS.inputs == "mnist":
        inputs.find_images(FLAGS.mnist_dir)
    if FLAGS.inputs == "official":
        official_files.find_features(_inputs_dir(), FLAGS.neurons)


def _inputs_dir() -> Path:
    """Folder of the official inputs: --dataset_dir, or where that file of a converted network lies."""
    path = Path(FLAGS.dataset_dir)
    return path.parent if path.is_file() else path


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


def _open_layers() -> Iterator[SparseLayer]:
    if FLAGS.weights == "radixnet":
        return radixnet.layers(FLAGS.neurons, FLAGS.layers, FLAGS.seed)
    if not Path(FLAGS.dataset_dir).is_file():
        return official_files.layers(FLAGS.dataset_dir, FLAGS.neurons, FLAGS.layers)
    network = NetworkFile(FLAGS.dataset_dir)
    if len(network) < FLAGS.layers:
        raise ValueError(
            f"{FLAGS.dataset_dir} holds {len(network)} layers, {FLAGS.layers} were asked for: lower --layers"
        )
    return itertools.islice(network, FLAGS.layers)


def _cap() -> float | None:
    if FLAGS.weights == "official" and Path(FLAGS.dataset_dir).is_file():
        return NetworkFile(FLAGS.dataset_dir).cap
    return networks.CAP


def _build_plan(seconds: dict[str, float]) -> Plan:
    read = 0.0

    def timed_layers() -> Iterator[SparseLayer]:
        nonlocal read
        layers = _open_layers()
        while True:
            start = time.perf_counter()
            layer = next(layers, None)
            read += time.perf_counter() - start
            if layer is None:
                return
            yield layer

    start = time.perf_counter()
    with report.progress_bar("building the plan", FLAGS.layers) as progress, jax.default_device(_host()):
        plan = build_plan(timed_layers(), cap=_cap(), compress=FLAGS.compress, kernel=FLAGS.kernel, progress=progress)
    seconds["read"] = read
    seconds["plan"] = time.perf_counter() - start - read
    return plan


def _host() -> Any:
    """Host memory, where a plan waits until it is known how much of it a device has room for."""
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to know of GPUs alone
        return None


def _read_features() -> np.ndarray:
    """The features of this process."""
    count, share = FLAGS.features, share_of_process()
    with report.progress_bar(f"preparing inputs ({FLAGS.inputs})", count) as progress:
        if FLAGS.inputs == "digits":
            return inputs.digits(FLAGS.neurons, count, FLAGS.seed, progress, share)
        if FLAGS.inputs == "mnist":
            return inputs.mnist(FLAGS.mnist_dir, FLAGS.neurons, count, progress, share)
        if FLAGS.inputs == "official":
            return official_files.features(_inputs_dir(), FLAGS.neurons, count, share)
        return inputs.random(FLAGS.neurons, count, seed=FLAGS.seed, share=share)


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


def _infer(runner: Runner, share: np.ndarray, seconds: dict[str, float]) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Seconds of each repeat, of the slowest process; the categories; active features by device and layer."""
    runner.place(share)
    _timed(seconds, "compile", runner.compile)
    results = runner.run()  # warm-up
    repeats = []
    with report.progress_bar("inference", FLAGS.repeats) as progress:
        for done in range(1, FLAGS.repeats + 1):
            hosts.meet(f"repeat {done}")
            start = time.perf_counter()
            runner.run()
            repeats.append(time.perf_counter() - start)
            progress(done)
    repeats = hosts.gather(np.asarray(repeats, np.float32)).max(axis=0).tolist()
    seconds["inference"] = float(np.median(repeats))
    return repeats, *runner.fetch(results)


def _profile(plan: Plan, y0: np.ndarray, backend: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    with report.progress_bar("timing layers", plan.layers) as progress:
        layers = _timed(
            seconds, "profile", lambda: profiling.profile_layers(plan, y0, backend=backend, progress=progress)
        )
    return [asdict(layer) for layer in layers]


def _check(share: np.ndarray, alive: np.ndarray) -> tuple[str | None, bool]:
    """Compares with the float64 oracle; returns the outcome in words, and whether they agree.

    Each process checks what it holds of the sample.
    """
    if FLAGS.check == "none":
        return None, True
    chosen = np.ones(len(alive), bool)
    if FLAGS.check == "sample" and len(alive) > _SAMPLE:
        chosen[:] = False
        chosen[np.random.default_rng(FLAGS.seed).choice(len(alive), _SAMPLE, replace=False)] = True
    own = share_of_process()
    differs = np.zeros(len(alive), bool)
    differs[own][chosen[own]] = _oracle(share[chosen[own]]) != alive[own][chosen[own]]
    wrong = np.flatnonzero(hosts.gather(differs).any(axis=0))
    count = np.count_nonzero(chosen)
    if wrong.size == 0:
        return f"categories of {count:,} features equal the float64 oracle's", True
    return (
        f"FAILED: {wrong.size} of {count:,} categories differ from the float64 oracle's, first {wrong[0] + 1}",
        False,
    )


def _oracle(y0: np.ndarray) -> np.ndarray:
    """The oracle's categories, for as many features at a time as fit; the layers are read anew each time."""
    step = max(1, _ORACLE_BYTES // (8 * y0.shape[1]))
    parts = [y0[first : first + step] for first in range(0, len(y0), step)]
    categories = []
    with report.progress_bar(f"float64 oracle ({len(y0):,} features)", FLAGS.layers * len(parts)) as progress:
        for number, part in enumerate(parts):
            done = number * FLAGS.layers
            result = oracle.infer(
                _open_layers(), part, cap=_cap(), progress=lambda layer, done=done: progress(done + layer)
            )
            categories.append(result.categories)
    return np.concatenate(categories) if categories else np.zeros(0, bool)


def _compare(categories: np.ndarray, truth: np.ndarray | None) -> tuple[str | None, bool]:
    """Compares with the truth file; returns the outcome in words, and whether they agree."""
    if truth is None:
        return None, True
    truth = truth[truth <= FLAGS.features]
    common = np.intersect1d(categories, truth).size
    agree = common == len(truth) == len(categories)
    text = f"{common:,} of the file's {len(truth):,} categories found, {len(categories) - common:,} beside them"
    return (text if agree else f"DIFFERS: {text}"), agree


# --- other commands ---------------------------------------------------------------------------------------------------


def _convert(_: list[str]) -> int:
    if not FLAGS.dataset_dir or not FLAGS.output:
        _reject("spdnn convert needs --dataset_dir and --output")
    _check_writable(FLAGS.output)
    with report.progress_bar("converting", FLAGS.layers) as progress:
        official_files.convert(FLAGS.dataset_dir, FLAGS.neurons, FLAGS.layers, FLAGS.output, progress)
    print(f"wrote {FLAGS.output} ({Path(FLAGS.output).stat().st_size / 2**20:.1f} MiB): run it with "
          f"--weights=official --dataset_dir={FLAGS.output}")  # fmt: skip
    return 0


def _download(_: list[str]) -> int:
    if not FLAGS.dataset_dir:
        _reject("spdnn download needs --dataset_dir")
    folder = Path(FLAGS.dataset_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for official in download.official_paths(FLAGS.neurons, FLAGS.layers):
        url, target = f"{FLAGS.base_url.rstrip('/')}/{official}", folder / Path(official).name
        with report.byte_bar(target.name) as progress:
            path = download.download(url, target, progress=progress)
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def _bench(configurations: list[str]) -> int:
    """Runs each flagfile in a process of its own and gathers the reports."""
    if not configurations:
        _reject("spdnn bench needs the flagfiles to run, such as configs/1024x120.flags")
    _check_writable(FLAGS.report_out)
    given = [flag for flag in FLAGS.get_key_flags_for_module(__name__) if flag.present and flag.name != "report_out"]
    passed_on = [flag.serialize() for flag in given]
    reports: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for configuration in configurations:
            path = Path(folder) / "report.json"
            # -P: the installed package, not a source tree in the working folder
            command = [sys.executable, "-P", "-m", "spdnn_jax", f"--flagfile={configuration}", *passed_on]
            outcome = subprocess.run([*command, f"--report_out={path}"], check=False)
            if outcome.returncode:
                return outcome.returncode
            reports += report.read_reports([path])
    if FLAGS.report_out:
        report.write_json(FLAGS.report_out, reports)
    return 0


def _plot(paths: list[str]) -> int:
    if not paths or not FLAGS.output:
        _reject("spdnn plot needs reports and --output: spdnn plot report.json --output=figure.png")
    _check_writable(FLAGS.output)
    draw = report.plot_layers if FLAGS.figure == "layers" else report.plot_networks
    draw(report.read_reports(paths), FLAGS.output)
    print(f"wrote {FLAGS.output}")
    return 0
