"""The commands beside `run`: convert, download, bench, plot."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from spdnn_jax._interrupts import on_interrupt
from spdnn_jax.command_line import options, own, plots, report
from spdnn_jax.command_line.options import FLAGS
from spdnn_jax.command_line.progress import byte_bar, progress_bar
from spdnn_jax.graph_challenge import official_files
from spdnn_jax.graph_challenge.download import download as fetch
from spdnn_jax.graph_challenge.download import official_paths


def convert(_: list[str]) -> int:
    """Writes official files, or those of --network, as one network file."""
    if not (FLAGS.dataset_dir or FLAGS.network) or not FLAGS.output:
        options.reject("spdnn convert needs --output, and --network or --dataset_dir")
    own.require_flags()
    options.check_outputs("output")
    if FLAGS.network:
        own.network().save(FLAGS.output)
        _say_written(f"--network={FLAGS.output}")
        return 0
    with progress_bar("converting", FLAGS.layers) as progress:
        official_files.convert(FLAGS.dataset_dir, FLAGS.neurons, FLAGS.layers, FLAGS.output, progress)
    _say_written(f"--weights=official --dataset_dir={FLAGS.output}")
    return 0


def _say_written(how_to_run: str) -> None:
    size = Path(FLAGS.output).stat().st_size
    print(f"wrote {FLAGS.output} ({size / 2**20:.1f} MiB): run it with {how_to_run}")


def download(_: list[str]) -> int:
    """Fetches the official files."""
    if not FLAGS.dataset_dir:
        options.reject("spdnn download needs --dataset_dir")
    folder = Path(FLAGS.dataset_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for official in official_paths(FLAGS.neurons, FLAGS.layers):
        url, target = f"{FLAGS.base_url.rstrip('/')}/{official}", folder / Path(official).name
        with byte_bar(target.name) as progress:
            path = fetch(url, target, progress=progress)
        print(f"{path}: {path.stat().st_size:,} bytes")
    return 0


def bench(configurations: list[str]) -> int:
    """Runs each flagfile in a process of its own and gathers the reports."""
    if not configurations:
        options.reject("spdnn bench needs the flagfiles to run, such as configs/1024x120.flags")
    options.check_outputs("report_out")
    passed_on = [flag.serialize() for flag in options.defined() if flag.present and flag.name != "report_out"]
    reports: list[dict[str, Any]] = []
    for configuration in configurations:
        with tempfile.TemporaryFile() as file:
            # -P: the installed package, not a source tree in the working folder
            command = [sys.executable, "-P", "-m", "spdnn_jax", f"--flagfile={configuration}", *passed_on]
            command.append(f"--report_out=/dev/fd/{file.fileno()}")
            with subprocess.Popen(command, pass_fds=[file.fileno()]) as run, on_interrupt(run.terminate):
                code = run.wait()
            if code:
                return code if code > 0 else 128 - code  # as a shell reports a signal
            reports.append(json.load(file))
    if FLAGS.report_out:
        report.write_json(FLAGS.report_out, reports)
    return 0


def plot(paths: list[str]) -> int:
    """Draws reports."""
    if not paths or not FLAGS.output:
        options.reject("spdnn plot needs reports and --output: spdnn plot report.json --output=figure.png")
    options.check_outputs("output")
    draw = plots.plot_layers if FLAGS.figure == "layers" else plots.plot_networks
    draw(report.read_reports(paths), FLAGS.output)
    print(f"wrote {FLAGS.output}")
    return 0
