"""Several processes, on one host or many, that run one network together through `jax.distributed`."""

import faulthandler
import os
import sys
import threading
from typing import NoReturn

import jax
import numpy as np

from spdnn_jax._interrupts import watch

AUTO = "auto"
"""As the coordinator's address: Slurm or Open MPI say where it is, how many processes there are, and which this is."""

_GRACE = 60  # seconds
_CURE = "start all of them, with one address that all can reach"


def join(address: str, count: int | None, number: int | None, timeout: int) -> None:
    """Joins the other processes; to be called before JAX is used for anything else.

    A process that dies, or is not heard of for `timeout` seconds, ends all others. Where the others do not come within
    that time, this process says so and ends.

    Args:
        address: "host:port" of process 0, the same in all processes, or `AUTO`.
        count: Number of processes; None where `AUTO` finds it out.
        number: Of this process, from 0; None where `AUTO` finds it out.
        timeout: Seconds to wait for a process that does not answer.

    Raises:
        ValueError: The address or the numbers make no sense.
    """
    if address != AUTO:
        if count is None or number is None:
            raise ValueError("--coordinator_address needs --num_processes and --process_id, or to be auto")
        if not 0 <= number < count:
            raise ValueError(f"--process_id counts from 0 to --num_processes - 1 = {count - 1}, got {number}")
    # JAX aborts the process, with a stack trace, where the others do not come: we speak first, and in one line.
    give_up = threading.Timer(timeout, _give_up, [address, timeout])
    give_up.daemon = True
    give_up.start()
    try:
        jax.distributed.initialize(
            coordinator_address=None if address == AUTO else address,
            num_processes=count,
            process_id=number,
            initialization_timeout=timeout + _GRACE,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"the processes could not join at {address} ({first_line}): {_CURE}") from None
    finally:
        give_up.cancel()
    watch()  # JAX takes SIGTERM for itself, and waits
    faulthandler.disable()  # JAX says itself which process was lost; where this one stood then tells nothing


def _give_up(address: str, timeout: int) -> None:
    print(f"spdnn: error: the processes did not meet at {address} within {timeout} s: {_CURE}", file=sys.stderr)
    leave(1)


def is_first() -> bool:
    """Whether this process speaks for all: it prints and writes the one report."""
    return jax.process_index() == 0


def meet(purpose: str) -> None:
    """Returns when all processes have come here."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(purpose)


def gather(values: np.ndarray) -> np.ndarray:
    """What each process has, (processes, ...), in every process."""
    if jax.process_count() == 1:
        return values[None]
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(values))


def leave(code: int) -> NoReturn:
    """Ends this process at once after a failure: waiting for the others to agree would hold all of them up.

    They notice that it is gone, and end, too.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
