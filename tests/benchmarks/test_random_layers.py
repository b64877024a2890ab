"""Random layers of the benchmarks: that they are what they say."""

import math

import numpy as np

from benchmarks.random_layers import random_layer


def test_random_layers_are_what_they_are_asked_to_be() -> None:
    layer = random_layer(np.random.default_rng(0), 50, np.asarray([3, 3, 0, 50]), share=2, bias=0.5)
    layer.validate()
    assert np.diff(layer.indptr).tolist() == [3, 3, 0, 0], "a set is as large as its first output says"
    assert layer.indices[:3].tolist() == layer.indices[3:].tolist()
    assert math.isclose(float(layer.bias), 0.5)
