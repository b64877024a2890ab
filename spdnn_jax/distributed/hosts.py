"""Several processes, on one host or many, that run one network together through `jax.distributed`."""

import contextlib
import faulthandler
import json
import os
import re
import socket
import sys
import threading
import time
from typing import Any, NoReturn

import jax
import numpy as np

from spdnn_jax import _interrupts
from spdnn_jax._native import core

AUTO = "auto"
"""As the coordinator's address: Slurm or Open MPI say where it is, how many processes there are, and which this is."""

_GRACE = 60  # seconds
_LINGER = 1  # seconds
_CURE = "start all of them, each with its own --process_id, with one --num_processes and one address that all can reach"
_ADDRESS = re.compile(r"(?P<host>\[[^\]]+\]|[^:\[\]\s]+):(?P<port>[0-9]{1,5})")
_PORTS = range(1, 1 << 16)
_SETTINGS = "spdnn/settings"


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
        _check(address, count, number)
    faulthandler.disable()  # where this process stands tells nothing about one that is lost
    # JAX aborts the process, with a stack trace, where the others do not come: we speak first, and in one line.
    in_vain = f"spdnn: error: the processes did not meet at {address} within {timeout} s: {_CURE}"
    core.end_on_abort(_interrupts.errors, f"{in_vain}\n")
    give_up = threading.Timer(timeout, _give_up, [in_vain])
    give_up.daemon = True
    give_up.start()
    try:
        if address != AUTO and number == 0:
            _try_port(address)
        jax.distributed.initialize(
            coordinator_address=None if address == AUTO else address,
            num_processes=count,
            process_id=number,
            initialization_timeout=timeout + _GRACE,
            heartbeat_timeout_seconds=timeout,
            shutdown_timeout_seconds=timeout,
        )
    except (OSError, RuntimeError, ValueError) as error:
        first_line = str(error).partition("\n")[0]
        raise ValueError(f"the processes could not join at {address} ({first_line}): {_CURE}") from None
    finally:
        give_up.cancel()
    lost = f"process {_state().process_id}: another process was lost, or does not answer: this one ends, too"
    core.end_on_abort(_interrupts.errors, f"spdnn: error: {lost}\n")
    _interrupts.watch()  # JAX takes SIGTERM for itself, and waits


def _try_port(address: str) -> None:
    """Listens where process 0 is to: jaxlib crashes, most of the time, where another program does."""
    socket.create_server(("", int(address.rpartition(":")[2]))).close()


def _check(address: str, count: int | None, number: int | None) -> None:
    parts = _ADDRESS.fullmatch(address)
    if parts is None or int(parts["port"]) not in _PORTS:
        raise ValueError(
            f"--coordinator_address must be HOST:PORT, a host's name and a port from 1 to {_PORTS[-1]}, or auto; "
            f"got {address!r}"
        )
    if count is None or number is None:
        raise ValueError("--coordinator_address needs --num_processes and --process_id, or to be auto")
    if not 0 <= number < count:
        raise ValueError(f"--process_id counts from 0 to --num_processes - 1 = {count - 1}, got {number}")


def _give_up(in_vain: str) -> None:
    print(in_vain, file=sys.stderr)
    leave(1)


def _state() -> Any:
    """What JAX knows of the processes, without a look at devices, which would wait for all of them."""
    from jax._src.distributed import global_state

    return global_state


def agree(settings: dict[str, Any], timeout: int) -> None:
    """Compares what the processes were started with; to be called by all of them, before anything else.

    Args:
        settings: By name, what has to be the same in all processes.
        timeout: Seconds to wait for a process that does not answer.

    Raises:
        ValueError: In every process, where they differ; the message names the first difference.
    """
    client: Any = _state().client
    client.key_value_set(f"{_SETTINGS}/{number()}", json.dumps(settings))
    client.wait_at_barrier("spdnn settings written", timeout * 1000)
    others = {int(key.rpartition("/")[2]): json.loads(text) for key, text in client.key_value_dir_get(f"{_SETTINGS}/")}
    differences = [
        f"process {other} has {name}={theirs.get(name)}, process 0 {name}={value}"
        for other, theirs in sorted(others.items())
        for name, value in others[0].items()
        if theirs.get(name) != value
    ]
    if differences:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # so that all have read before one leaves
            client.wait_at_barrier("spdnn settings read", timeout * 1000)
        raise ValueError(f"the processes were started differently: {differences[0]}: start all with the same flags")


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


def number() -> int:
    """Of this process, from 0."""
    return _state().process_id


def leave(code: int) -> NoReturn:
    """Ends this process at once after a failure: waiting for the others to agree would hold all of them up.

    They notice that it is gone, and end, too. With process 0 goes what they know each other through: where all fail, it
    lets them speak first.
    """
    if number() == 0 and _state().client is not None:
        time.sleep(_LINGER)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
