"""Features spread over all devices, each with the whole network; nothing is gathered until the answer is read.

    python examples/sharded.py [NEURONS LAYERS FEATURES]

On a machine with one CPU, to see it spread: XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import sys

import jax
import numpy as np

from spdnn_jax import build_plan, feature_mesh, infer, infer_sharded, replicate
from spdnn_jax.graph_challenge import inputs, radixnet

neurons, layers, features = map(int, sys.argv[1:] or (1024, 120, 60000))
mesh = feature_mesh()  # all devices
plan = build_plan(radixnet.layers(neurons, layers), cap=32.0)
plan_everywhere = replicate(plan, mesh)  # once
y0 = inputs.random(neurons, features)
y = infer_sharded(plan_everywhere, y0, mesh)
for shard in y.addressable_shards:
    print(f"{shard.device}: features {shard.index[0].start or 0:,} to {shard.index[0].stop or features:,}")
np.testing.assert_array_equal(y, infer(plan, y0))
print(f"{features:,} features on {jax.device_count()} devices, equal to those of one")
