"""Kernel times by CUPTI-free means: long chains, categories on device."""
import sys, time, statistics, itertools
import jax, numpy as np
from spdnn_jax import SparseLayer, SparseNetwork, build_plan, infer, categories, ops, planner
from spdnn_jax.graph_challenge import inputs, radixnet, oracle
import scipy.sparse as sp
print(jax.__version__, jax.devices())
what = sys.argv[1].split(",")
def med(f, n=9):
    jax.block_until_ready(f())
    ts = []
    for _ in range(n):
        t = time.perf_counter(); jax.block_until_ready(f()); ts.append(time.perf_counter() - t)
    return statistics.median(ts)
def fresh():
    planner.schedule.cache_clear(); jax.clear_caches()
rng = np.random.default_rng(0)
def error(net, plan, y):
    got = np.asarray(infer(plan, y)); ref = oracle.infer(net.layers, y, cap=net.cap).activations
    return np.abs(got - ref).max() / max(1, np.abs(ref).max())
def grouped_net(n, L, bias=0.01, cap=32.0): return SparseNetwork(tuple(SparseLayer(l.indptr, l.indices, l.values, np.float32(bias), l.inputs) for l in radixnet.layers(n, L)), cap=cap)
def random_net(n, L, edges=32):
    base = []
    for k in range(min(L, 3)):
        idx = (np.sort(rng.integers(0, n, (n, edges)), axis=1) + np.arange(edges)) % n
        base.append(SparseLayer.from_scipy(sp.coo_array((rng.normal(0, .2, n * edges).astype(np.float32), (idx.reshape(-1), np.repeat(np.arange(n), edges))), shape=(n, n)), bias=0.1))
    return SparseNetwork(tuple(base[k % len(base)] for k in range(L)), cap=32.0)
for kind, make in (("grouped", grouped_net), ("random", random_net)):
    if kind not in what: continue
    for n in (1024, 4096, 16384):
        feats = 60000 if n < 16384 else 20000
        for L in (1, 3, 20):
            net = make(n, L); y = rng.integers(0, 2, (feats, n), np.uint8)
            plan = build_plan(net, kernel="resident"); planner._RESIDENT_ENDS = (); fresh()
            err = error(net, plan, y[:100]); yd = jax.device_put(y); f = jax.jit(categories)
            t = med(lambda: f(plan, yd), 7); e = feats * float(np.sum(plan.multiplied_edges))
            print(f"{kind} {n} {L} layers: {t*1e3:.3f} ms {e/t/1e12:.2f} T err {err:.1e}", flush=True)
            del yd
if "tail" in what:
    for n, feats in ((1024, 2000), (1024, 64), (1024, 1), (4096, 2000), (4096, 1)):
        times = []
        for L in (100, 500):
            plan = build_plan(grouped_net(n, L), kernel="resident"); planner._RESIDENT_ENDS = (); fresh()
            yd = jax.device_put(rng.integers(0, 2, (feats, n), np.uint8)); f = jax.jit(categories)
            times.append(med(lambda: f(plan, yd)))
        print(f"tail {n} {feats}: {(times[1]-times[0])/400*1e6:.2f} us a layer (100 layers {times[0]*1e6:.0f} us)", flush=True)
if "networks" in what:
    for n, L in ((1024, 120), (1024, 480), (1024, 1920), (4096, 120), (4096, 480), (16384, 120)):
        yd = jax.device_put(inputs.mnist(sys.argv[2], n, 60000)); plan = build_plan(radixnet.layers(n, L), cap=32.0)
        for ends in ((3, 6, 10, 18), (2, 4, 7, 12), (6, 14)):
            planner._RESIDENT_ENDS = ends; fresh(); f = jax.jit(categories)
            t = med(lambda: f(plan, yd)); print(f"{n}x{L} ends {ends}: {t*1e3:.3f} ms", flush=True)
        del yd
