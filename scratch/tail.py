import sys, itertools
import jax, numpy as np
from spdnn_jax import SparseLayer, SparseNetwork, build_plan, categories, planner
from spdnn_jax.graph_challenge import radixnet
n, feats, L = (int(a) for a in sys.argv[1:4])
planner._RESIDENT_ENDS = ()
ls = [SparseLayer(l.indptr, l.indices, l.values, np.float32(.01), l.inputs) for l in radixnet.layers(n, L)]
plan = build_plan(SparseNetwork(tuple(ls), cap=32.0), kernel="resident")
yd = jax.device_put(np.random.default_rng(0).integers(0, 2, (feats, n), np.uint8)); f = jax.jit(categories)
for _ in range(2): jax.block_until_ready(f(plan, yd))
