"""The program `spdnn`: its commands found and called, and how it ends."""

import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import app, flags, logging

from spdnn_jax import _interrupts
from spdnn_jax.command_line import commands, doctor, options, report, run, streams
from spdnn_jax.command_line.options import FLAGS
from spdnn_jax.distributed import hosts

_COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run.run,
    "convert": commands.convert,
    "download": commands.download,
    "bench": commands.bench,
    "plot": commands.plot,
    "doctor": doctor.doctor,
}
_OPERANDS = {"bench": " FLAGFILE...", "plot": " REPORT..."}
_HELP = {"-h", "--h", "-help", "--help"}


def main() -> NoReturn:
    """The console script `spdnn`."""
    _interrupts.watch()
    streams.take_over()
    logging.set_verbosity(logging.WARNING)  # libraries log through absl, too
    app.run(_main, flags_parser=_parse)


def _parse(arguments: list[str]) -> list[str]:
    if "--version" in arguments:
        print(", ".join(f"{name} {version}" for name, version in report.versions().items()))
        sys.exit(0)
    if _HELP.intersection(arguments):
        print(_help(next((word for word in arguments[1:] if word in _COMMANDS), None)))
        sys.exit(0)
    try:
        return FLAGS(arguments)
    except (flags.Error, OSError, ValueError) as error:  # of a flagfile that is no text, too
        print(f"FATAL Flags parsing error: {error}\nPass --help for the flags.", file=sys.stderr)
        sys.exit(2)


def _help(command: str | None) -> str:
    if command is not None:
        head = f"spdnn {command}{_OPERANDS.get(command, '')} [flags]: {_COMMANDS[command].__doc__}"
        return f"{head}\n\n{options.help_of(command)}".strip()
    commands = [f"  {name + _OPERANDS.get(name, ''):<18}{does.__doc__}" for name, does in _COMMANDS.items()]
    head = ["spdnn [COMMAND] [flags]; without a command: run", ""]
    foot = ["", "spdnn COMMAND --help tells a command's flags; --flagfile=FILE reads flags from a file"]
    return "\n".join(head + commands + foot)


def _main(arguments: list[str]) -> int:
    name, *rest = arguments[1:] or ["run"]
    if name not in _COMMANDS:
        options.reject(f"there is no command {name!r}: choose one of {', '.join(_COMMANDS)}")
    if rest and name not in _OPERANDS:
        options.reject(f"spdnn {name} takes flags only, found {rest[0]!r}")
    try:
        code = _in_step(_COMMANDS[name], rest)
        sys.stdout.flush()
        return code
    except (ValueError, OSError, ImportError) as error:
        return _fail(_one_line(error))
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        needed = _one_line(error) or "the host has too little"
        return _fail(f"out of memory: {needed}: lower --stream_features, --stream_layers, or --features")


def _in_step(command: Callable[[list[str]], int], rest: list[str]) -> int:
    """Runs a command; where several processes run it, one that fails does not keep the others waiting."""
    if FLAGS.coordinator_address is None:
        if FLAGS.num_processes is not None or FLAGS.process_id is not None:
            raise ValueError(
                "--num_processes and --process_id need --coordinator_address: each process would run alone"
            )
        return command(rest)
    streams.silence_native_code()
    hosts.join(FLAGS.coordinator_address, FLAGS.num_processes, FLAGS.process_id, FLAGS.lost_after)
    try:
        hosts.agree(options.shared() | report.versions(), FLAGS.lost_after)
        return command(rest)
    except jax.errors.JaxRuntimeError as error:
        _leave(f"lost contact with another process, or with a device: {_one_line(error)}")
    except (ValueError, OSError, ImportError, MemoryError) as error:
        _leave(_one_line(error))
    except Exception:
        traceback.print_exc()
        _leave("this process ends, and the others with it")


def _leave(message: str) -> NoReturn:
    hosts.leave(_fail(f"process {hosts.number()}: {message}"))


def _fail(message: str) -> int:
    print(f"spdnn: error: {message}", file=sys.stderr)
    return 1


def _one_line(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}: check the path and its permissions"
    return " ".join(str(error).split())
