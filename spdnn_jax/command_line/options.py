"""The flags of the program, and which command takes which."""

import itertools
import os
import sys
import textwrap
from typing import NoReturn

from absl import flags

from spdnn_jax import planner, simplify
from spdnn_jax._files import check_writable
from spdnn_jax.graph_challenge import download, networks

SAMPLE = 1000
"""Features of --check=sample."""

INPUTS = ("digits", "mnist", "official", "random")
"""What --inputs may be beside a file."""

OF_NETWORK = ("activation", "biases", "transpose", "index_base", "tensors")
"""Flags that say what --network does not."""

_MOST = 2**31 - 1

FLAGS = flags.FLAGS
flags.DEFINE_integer("neurons", 1024, "Neurons of a layer: 16 * 2^k; 1024, 4096, 16384 or 65536 in the challenge.", 1)
flags.DEFINE_integer("layers", 120, "Number of layers: 120, 480 or 1920 in the challenge.", 1, _MOST)
flags.DEFINE_enum("weights", "radixnet", ["radixnet", "official"], "Generated weights, or those in --dataset_dir.")
flags.DEFINE_string(
    "dataset_dir", None, "Folder of the official files, their .tar.gz, or a network file that spdnn convert wrote."
)
flags.DEFINE_list("network", None, "Instead of --weights: the file, folder or files of a network of one's own.")
flags.DEFINE_list(
    "activation",
    None,
    "Of --network: relu, relu:CAP, clip:LOWER:UPPER or identity; or two, the second for the last layer.",
)
flags.DEFINE_list("biases", None, "Of --network: a file for each layer, a folder, or a number.")
flags.DEFINE_bool("transpose", None, "Whether matrices of --network are (outputs, inputs); by default in state dicts.")
flags.DEFINE_integer("index_base", 1, "What neurons count from in --network's tables of edges.", 0, 1)
flags.DEFINE_list("tensors", None, "Names or patterns of the matrices in --network's state dict, in order.")
flags.DEFINE_string("inputs", "digits", f"Where the features come from: {', '.join(INPUTS)}, or a file of rows.")
flags.DEFINE_float("full_scale", None, "What stands for 1 in a file of --inputs: 255 in images of bytes.", 1e-30)
flags.DEFINE_string("labels", None, "File with the class of each feature, from 0: run prints the accuracy.")
flags.DEFINE_string("mnist_dir", None, "Folder of the MNIST files in IDX form, for --inputs=mnist.")
flags.DEFINE_integer("features", networks.FEATURES, "Number of features.", 1, _MOST)
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
    "check", "sample", ["none", "sample", "full"], f"Features checked against the oracle: none, {SAMPLE}, all."
)
flags.DEFINE_string("truth", None, "Truth file to compare the categories with; the exit code is 1 where they differ.")
flags.DEFINE_string("categories_out", None, "Where to write the categories, in the form of the truth files.")
flags.DEFINE_string("report_out", None, "Where to write the report as JSON.")
flags.DEFINE_enum(
    "figure", "layers", ["layers", "networks"], "What plot draws: the layers of the runs, or the time of each network."
)
flags.DEFINE_string("output", None, "The file that convert or plot writes.")
flags.DEFINE_string("base_url", download.BASE_URL, "Where download finds the official files.")


def defined() -> list[flags.Flag]:
    """All flags of the program, without those of the libraries that it uses."""
    return FLAGS.get_key_flags_for_module(__name__)


_TAKEN = {
    "convert": ("neurons", "layers", "dataset_dir", "network", *OF_NETWORK, "output"),
    "download": ("neurons", "layers", "dataset_dir", "base_url"),
    "plot": ("figure", "output"),
    "doctor": (),
}
"""Flags of the commands that do not run a network."""

_OWN = (
    *("process_id", "coordinator_address", "dataset_dir", "network", "mnist_dir", "labels", "truth"),
    *("categories_out", "report_out"),
)
"""Flags that may differ between the processes of a run: which it is, and where things are on its host."""

_HELP_COLUMN = 24


def taken_by(command: str) -> list[flags.Flag]:
    """The flags that a command takes."""
    if command in _TAKEN:
        return [FLAGS[name] for name in _TAKEN[command]]
    return [flag for flag in defined() if flag.name not in ("figure", "output", "base_url")]


def shared() -> dict[str, object]:
    """Flags that all processes of a run need to be given alike."""
    return {f"--{flag.name}": flag.value for flag in defined() if flag.name not in _OWN}


def help_of(command: str) -> str:
    """The flags of a command with their defaults, a line or two for each."""
    lines = []
    for flag in taken_by(command):
        default = "" if flag.default is None else f" Default: {flag.default}."
        indent = " " * _HELP_COLUMN
        text = textwrap.fill(f"{flag.help}{default}", 100, initial_indent=indent, subsequent_indent=indent)
        name = f"  --{flag.name}"
        lines.append(name.ljust(_HELP_COLUMN) + text[_HELP_COLUMN:] if len(name) < _HELP_COLUMN else f"{name}\n{text}")
    return "\n".join(lines)


def reject(message: str) -> NoReturn:
    """Ends the program for a mistake in its flags."""
    print(f"FATAL Flags parsing error: {message}\nPass --help for the flags.", file=sys.stderr)
    sys.exit(2)


def check_outputs(*names: str) -> None:
    """Says so before a long run, not after it, where the files that these flags name could not all be written."""
    given = {name: str(FLAGS[name].value) for name in names if FLAGS[name].value}
    for path in given.values():
        check_writable(path)
    for (first, path), (second, other) in itertools.combinations(given.items(), 2):
        if os.path.realpath(path) == os.path.realpath(other) and not path.startswith("/dev/"):
            reject(f"--{first} and --{second} are one file, {path}: the second would replace the first")
