"""What a run needs of this machine's memory: said before minutes of preparation, refused where it cannot be had."""

import resource
import sys
from pathlib import Path

import jax

from spdnn_jax.command_line.options import FLAGS, INPUTS
from spdnn_jax.graph_challenge.networks import EDGES_PER_NEURON

_SAID = 1 << 30  # bytes that are worth a line
_GROUP = 16  # outputs that share their inputs in a challenge network
_INDEX_BYTES = 2
_GROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def check(backend: str) -> None:
    """Compares what the features and the plan take at least with what there is.

    Args:
        backend: The back end that will run: "cpu" keeps features and their copy for the device in one memory.

    Raises:
        ValueError: They cannot fit; the message says what to change.
    """
    if FLAGS.inputs not in INPUTS:
        return  # read already
    copies = 1 if backend == "cuda" else 2
    features = copies * -(-FLAGS.features // jax.process_count()) * FLAGS.neurons
    plan = 0
    if not FLAGS.network and FLAGS.compress == "none":
        plan = FLAGS.layers * FLAGS.neurons * EDGES_PER_NEURON // _GROUP * _INDEX_BYTES
    there = available()
    if there is not None and features + plan > there:
        larger = "features" if features > plan else "layers"
        raise ValueError(
            f"{FLAGS.features:,} features of {FLAGS.neurons:,} neurons need {_gib(features)} of this machine's memory "
            f"and {FLAGS.layers:,} layers {_gib(plan)}, but {_gib(there)} are available: lower --{larger}, or share "
            "the features between machines (--num_processes)"
        )
    if features + plan > _SAID:
        print(
            f"spdnn: features need {_gib(features)} and the plan at least {_gib(plan)} of memory"
            f"{'' if there is None else f'; {_gib(there)} are available'}",
            file=sys.stderr,
        )


def available() -> int | None:
    """Bytes that this process could have, at most: of the machine, of its container, by its limits; None: not known."""
    limits = [resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_DATA)[0]]
    found = [limit for limit in limits if limit != resource.RLIM_INFINITY]
    found += [int(words[0]) for words in map(_words, _GROUPS) if words and words[0].isdecimal()]
    words = _words("/proc/meminfo")
    if "MemAvailable:" in words:
        found.append(1024 * int(words[words.index("MemAvailable:") + 1]))
    return min(found, default=None)


def _words(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").split()
    except OSError:
        return []


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"
