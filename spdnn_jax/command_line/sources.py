"""The network and the features that the flags name."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from spdnn_jax.activation import Activation
from spdnn_jax.command_line import options, own
from spdnn_jax.command_line.options import FLAGS
from spdnn_jax.command_line.progress import progress_bar
from spdnn_jax.distributed.mesh import share_of_process
from spdnn_jax.graph_challenge import input_cache, inputs, networks, official_files, radixnet
from spdnn_jax.network import NetworkFile, SparseLayer


def open_layers() -> Iterator[SparseLayer]:
    """The layers, read or generated one at a time."""
    if FLAGS.network:
        return iter(own.network().layers)
    if FLAGS.weights == "radixnet":
        return radixnet.layers(FLAGS.neurons, FLAGS.layers, FLAGS.seed)
    if not _is_network_file():
        return official_files.layers(FLAGS.dataset_dir, FLAGS.neurons, FLAGS.layers)
    network = NetworkFile(FLAGS.dataset_dir)
    if len(network) < FLAGS.layers:
        raise ValueError(
            f"{FLAGS.dataset_dir} holds {len(network)} layers, {FLAGS.layers} were asked for: lower --layers"
        )
    return itertools.islice(network, FLAGS.layers)


def activation() -> Activation:
    """What follows the layers."""
    if FLAGS.network:
        return own.network().activation
    if FLAGS.weights == "official" and _is_network_file():
        return NetworkFile(FLAGS.dataset_dir).activation[: FLAGS.layers]
    return networks.ACTIVATION


def _is_network_file() -> bool:
    """Whether --dataset_dir is a file that spdnn convert wrote, not official files or their archive."""
    return Path(FLAGS.dataset_dir).is_file() and not FLAGS.dataset_dir.endswith(official_files.ARCHIVE)


def find_inputs() -> None:
    """Says so before the plan is built, not after it, where the inputs are missing."""
    if FLAGS.inputs == "mnist":
        inputs.find_images(FLAGS.mnist_dir)
    if FLAGS.inputs == "official":
        official_files.find_features(_inputs_dir(), FLAGS.neurons)


def _inputs_dir() -> Path:
    """Folder of the official inputs: --dataset_dir, or where that file lies."""
    path = Path(FLAGS.dataset_dir)
    return path.parent if path.is_file() else path


def read_features() -> np.ndarray:
    """The features of this process."""
    count, share = FLAGS.features, share_of_process()
    if FLAGS.inputs not in options.INPUTS:
        return own.features()[:count][share]
    with progress_bar(f"preparing inputs ({FLAGS.inputs})", count) as progress:
        if FLAGS.inputs == "digits":
            return input_cache.digits(FLAGS.neurons, count, FLAGS.seed, progress, share)
        if FLAGS.inputs == "mnist":
            return inputs.mnist(FLAGS.mnist_dir, FLAGS.neurons, count, progress, share)
        if FLAGS.inputs == "official":
            return official_files.features(_inputs_dir(), FLAGS.neurons, count, share)
        return inputs.random(FLAGS.neurons, count, seed=FLAGS.seed, share=share)
