"""The categories of a run, compared with the float64 oracle's and with a truth file."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from spdnn_jax import ops
from spdnn_jax.command_line import sources
from spdnn_jax.command_line.options import FLAGS, SAMPLE
from spdnn_jax.command_line.progress import progress_bar
from spdnn_jax.distributed import hosts
from spdnn_jax.distributed.mesh import share_of_process
from spdnn_jax.graph_challenge import oracle
from spdnn_jax.plan import Plan

_ORACLE_BYTES = 1 << 31  # of float64 activations that the oracle holds at a time
_SCORED_BYTES = 1 << 28  # of activations on a device at a time


@dataclass(frozen=True)
class Check:
    """How a run compares with the float64 oracle.

    Attributes:
        text: The outcome in words; None where nothing was checked.
        agrees: Whether all categories that were checked are equal.
        largest_difference: Of activations after the last layer; None where they were not at hand.
        close_calls: Features whose category float32 may see otherwise, for a sum lies so near to zero.
    """

    text: str | None = None
    agrees: bool = True
    largest_difference: float | None = None
    close_calls: int | None = None


def check(share: np.ndarray, alive: np.ndarray, infer: Callable[[np.ndarray], np.ndarray] | None) -> Check:
    """Compares with the float64 oracle. Each process checks what it holds of the sample.

    Args:
        share: This process's features.
        alive: bool (features,): the categories of all.
        infer: Activations after the last layer of features of this process, float32 (features, outputs); None where
            they cannot be had.
    """
    if FLAGS.check == "none":
        return Check()
    chosen = np.ones(len(alive), bool)
    if FLAGS.check == "sample" and len(alive) > SAMPLE:
        chosen[:] = False
        chosen[np.random.default_rng(FLAGS.seed).choice(len(alive), SAMPLE, replace=False)] = True
    own = share_of_process()
    categories, close, largest = _oracle(share[chosen[own]], infer)
    differs, is_close = np.zeros((2, len(alive)), bool)
    differs[own][chosen[own]] = categories != alive[own][chosen[own]]
    is_close[own][chosen[own]] = close
    wrong, close = (np.flatnonzero(hosts.gather(found).any(axis=0)) for found in (differs, is_close))
    largest = float(hosts.gather(np.asarray([largest])).max())
    return Check(
        _outcome(wrong, int(chosen.sum()), close),
        not wrong.size,
        None if infer is None else largest,
        len(close),
    )


def _outcome(wrong: np.ndarray, count: int, close: np.ndarray) -> str:
    if wrong.size == 0:
        return f"categories of {count:,} features equal the float64 oracle's"
    why = "; all of these are close calls, which float32 may see otherwise" if np.isin(wrong, close).all() else ""
    return f"FAILED: {wrong.size} of {count:,} categories differ from the float64 oracle's, first {wrong[0] + 1}{why}"


def _oracle(y0: np.ndarray, infer: Callable[[np.ndarray], np.ndarray] | None) -> tuple[np.ndarray, np.ndarray, float]:
    """The oracle's categories, the close calls among them, and the largest difference of activations from the oracle's.

    For as many features at a time as fit; the layers are read anew each time.
    """
    step = max(1, _ORACLE_BYTES // (8 * y0.shape[1]))
    parts = [y0[first : first + step] for first in range(0, len(y0), step)]
    categories, close, largest = [np.zeros(0, bool)], [np.zeros(0, bool)], 0.0
    with progress_bar(f"float64 oracle ({len(y0):,} features)", FLAGS.layers * len(parts)) as progress:
        for number, part in enumerate(parts):
            done = number * FLAGS.layers
            result = oracle.infer(
                sources.open_layers(),
                part,
                activation=sources.activation(),
                errors=True,
                progress=lambda layer, done=done: progress(done + layer),
            )
            categories.append(result.categories)
            close.append(result.close_calls)
            if infer is not None:
                largest = max(largest, float(np.abs(infer(part) - result.activations).max(initial=0)))
    return np.concatenate(categories), np.concatenate(close), largest


def compare(categories: np.ndarray, truth: np.ndarray | None) -> tuple[str | None, bool]:
    """Compares with the truth file; returns the outcome in words, and whether they agree."""
    if truth is None:
        return None, True
    truth = truth[truth <= FLAGS.features]
    common = np.intersect1d(categories, truth).size
    agree = common == len(truth) == len(categories)
    text = f"{common:,} of the file's {len(truth):,} categories found, {len(categories) - common:,} beside them"
    return (text if agree else f"DIFFERS: {text}{_why_not_official()}"), agree


def _why_not_official() -> str:
    """Why a run on other data than the official cannot give the official truth, and what to do about it."""
    reasons = []
    if FLAGS.network:
        reasons.append("--network is another one than the official")
    elif FLAGS.weights != "official":
        reasons.append("generated weights are not the official ones")
    if FLAGS.inputs == "mnist":
        reasons.append("MNIST, resized by us, reproduces 98% of the official categories")
    elif FLAGS.inputs != "official":
        reasons.append(f"--inputs={FLAGS.inputs} are other features than the official ones")
    if not reasons:
        return ""
    return (
        f". If the file is the official truth, it cannot be met: {', and '.join(reasons)}. Fetch the official files "
        f"(spdnn download --neurons={FLAGS.neurons} --layers={FLAGS.layers} --dataset_dir=official), and run with "
        "--weights=official --inputs=official --dataset_dir=official"
    )


def score(plan: Plan, share: np.ndarray, labels: np.ndarray, backend: ops.Backend) -> int:
    """How many of all features have the largest output at their label. Each process runs what it holds."""
    if labels.max(initial=0) >= plan.outputs:
        raise ValueError(f"{FLAGS.labels}: label {labels.max()} of a network with {plan.outputs} outputs, from 0 on")
    step = max(1, _SCORED_BYTES // (4 * max(plan.inputs, *plan.table.layers["outputs"])))
    parts = [share[first : first + step] for first in range(0, len(share), step)]
    found = [np.argmax(ops.infer(plan, part, backend=backend), axis=1) for part in parts]
    right = np.zeros(len(labels), bool)
    own = share_of_process()
    right[own] = np.concatenate([np.zeros(0, int), *found]) == labels[own]
    return int(hosts.gather(right).any(axis=0).sum())
