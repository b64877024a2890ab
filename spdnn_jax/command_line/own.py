"""Files of one's own: what --network, --inputs and --labels name."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from spdnn_jax.activation import Clip
from spdnn_jax.command_line import options
from spdnn_jax.command_line.options import FLAGS
from spdnn_jax.io import read_array, read_network
from spdnn_jax.io.arrays import read_vector
from spdnn_jax.network import SparseNetwork


def require_flags() -> None:
    """Ends the program where flags do not go together."""
    for name in ("weights", "layers"):
        if FLAGS.network and FLAGS[name].present:
            options.reject(f"--network says all of its layers: drop --{name}")
    for name in options.OF_NETWORK:
        if FLAGS[name].present and not FLAGS.network:
            options.reject(f"--{name} is for --network")
    activations()
    if FLAGS.inputs not in options.INPUTS and not Path(FLAGS.inputs).is_file():
        options.reject(f"--inputs takes {', '.join(options.INPUTS)} or a file, and there is no file {FLAGS.inputs!r}")
    if FLAGS.full_scale and FLAGS.inputs in options.INPUTS:
        options.reject("--full_scale is for a file of --inputs")


def settle() -> None:
    """Reads the files, which say themselves what flags say of other sources: neurons, layers, features."""
    if FLAGS.network:
        FLAGS.neurons, FLAGS.layers = network().inputs, len(network().layers)
    if FLAGS.inputs not in options.INPUTS and not FLAGS["features"].present:
        FLAGS.features = len(features())


@functools.cache
def network() -> SparseNetwork:
    """The network of --network."""
    clips = activations()
    biases: Any = FLAGS.biases
    if biases and len(biases) == 1:
        number = _number(biases[0])
        biases = biases[0] if number is None else number
    result = read_network(
        FLAGS.network[0] if len(FLAGS.network) == 1 else FLAGS.network,
        activation=clips[0] if clips else None,
        biases=biases,
        transpose=FLAGS.transpose,
        index_base=FLAGS.index_base,
        names=FLAGS.tensors,
        inputs=FLAGS.neurons if FLAGS["neurons"].present else None,
    )
    if len(clips) == 2:
        return SparseNetwork(result.layers, [clips[0]] * (len(result.layers) - 1) + [clips[1]])
    return result


def activations() -> list[Clip]:
    """What --activation says: none, one for all layers, or that of the last layer, too."""
    clips = [_clip(text) for text in FLAGS.activation or ()]
    if len(clips) > 2:
        options.reject("--activation takes one for all layers, or two: that of all but the last, and the last one's")
    return clips


def _clip(text: str) -> Clip:
    name, *words = text.split(":")
    bounds = [_number(word) for word in words]
    try:
        match name, bounds:
            case "relu", []:
                return Clip.relu()
            case "relu", [float(cap)]:
                return Clip.relu(cap)
            case "clip", [float(lower), float(upper)]:
                return Clip(lower, upper)
            case "identity", []:
                return Clip.identity()
            case _:
                options.reject(f"--activation takes relu, relu:CAP, clip:LOWER:UPPER or identity, got {text!r}")
    except ValueError as error:
        options.reject(f"--activation={text}: {error}")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


@functools.cache
def features() -> np.ndarray:
    """All rows of the file of --inputs: uint8 or bool as they lie there, all else float32, divided by --full_scale."""
    path = FLAGS.inputs
    array = read_array(path)
    if array.ndim < 2 or array.dtype.kind not in "biuf":
        raise ValueError(f"{path}: expected a row of numbers for each feature, found {array.dtype} {array.shape}")
    if FLAGS["features"].present and len(array) < FLAGS.features:
        raise ValueError(f"{path} holds {len(array)} features, {FLAGS.features} were asked for: lower --features")
    array = array.reshape(len(array), -1)
    if FLAGS.full_scale:
        array = array / FLAGS.full_scale
    return array if array.dtype in (np.uint8, bool) else array.astype(np.float32)


def labels() -> np.ndarray | None:
    """The class of each feature, int64 (features,), if --labels names a file."""
    if not FLAGS.labels:
        return None
    found = read_vector(FLAGS.labels)
    if len(found) < FLAGS.features:
        raise ValueError(f"{FLAGS.labels} holds {len(found)} labels, but there are {FLAGS.features} features")
    whole = found.astype(np.int64)
    if (whole != found).any() or whole.min(initial=0) < 0:
        raise ValueError(f"{FLAGS.labels}: labels are whole numbers from 0 on: give the number of each feature's class")
    return whole[: FLAGS.features]
