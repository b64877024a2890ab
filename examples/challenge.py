"""The Graph Challenge from Python: generated weights, digits, categories, and the challenge's figure of speed.

Run it as python examples/challenge.py [NEURONS LAYERS FEATURES].
"""

import sys
import timeit

import jax

from spdnn_jax import build_plan, categories
from spdnn_jax.graph_challenge import inputs, radixnet

neurons, layers, features = map(int, sys.argv[1:] or (1024, 120, 60000))
plan = build_plan(radixnet.layers(neurons, layers), cap=32.0)
y0 = jax.device_put(inputs.digits(neurons, features))
seconds = min(timeit.repeat(lambda: categories(plan, y0).block_until_ready(), number=1, repeat=6))  # the first compiles
print(f"{categories(plan, y0).sum():,} categories, {features * plan.edges / seconds / 1e12:.2f} nominal TE/s")
