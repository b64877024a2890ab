"""Times resident kernels: chains of layers, tails, networks, with several cuts of launches."""
import sys, time, statistics, itertools
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, "benchmarks")
from random_layers import random_layer
from spdnn_jax import SparseLayer, SparseNetwork, build_plan, infer, categories, ops, planner
from spdnn_jax.graph_challenge import inputs, radixnet, oracle
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
def check(net, plan, y):
    got = np.asarray(infer(plan, y)); ref = oracle.infer(net.layers, y, cap=net.cap).activations
    return np.abs(got - ref).max() / max(1, np.abs(ref).max())
rng = np.random.default_rng(0)
def challenge_layers(n, count):
    return list(itertools.islice(radixnet.layers(n, count), count))
for n in (1024, 4096, 16384):
    feats = 60000 if n < 16384 else 30000
    for kind in ("grouped", "random"):
        if f"{kind}" not in what: continue
        for L in (1, 3, 20):
            if kind == "grouped":
                ls = [SparseLayer(l.indptr, l.indices, l.values, np.float32(.01), l.inputs) for l in challenge_layers(n, L)]
            else:
                four = [random_layer(rng, n, n, np.full(n, 32), 0.3) if False else None for _ in range(0)]
                base = []
                for k in range(min(L, 3)):
                    idx = rng.integers(0, n, (n, 32)); idx.sort(axis=1)
                    idx = (idx + np.arange(32)) % n; idx.sort(axis=1)
                    base.append(SparseLayer.from_scipy(__import__("scipy.sparse").sparse.coo_array((rng.normal(0, .2, n * 32).astype(np.float32), (idx.reshape(-1), np.repeat(np.arange(n), 32))), shape=(n, n)), bias=0.1))
                ls = [base[k % len(base)] for k in range(L)]
            net = SparseNetwork(tuple(ls), cap=32.0)
            y = rng.integers(0, 2, (feats, n), np.uint8)
            for fam in (("resident",) if L > 1 else ("resident",)):
                plan = build_plan(net, kernel=fam)
                old = planner._RESIDENT_ENDS; planner._RESIDENT_ENDS = (); fresh()
                err = check(net, plan, y[:300])
                yd = jax.device_put(y)
                f = jax.jit(categories)
                t = med(lambda: f(plan, yd), 7)
                planner._RESIDENT_ENDS = old; fresh()
                e = feats * float(np.sum(plan.multiplied_edges))
                print(f"{kind} {n} {L} layers {fam}: {t*1e3:.3f} ms {e/t/1e12:.2f} T err {err:.1e}", flush=True)
                del yd
if "tail" in what:
    for n, feats in ((1024, 2000), (1024, 500), (1024, 64), (1024, 1), (4096, 2000), (4096, 1)):
        ls = [SparseLayer(l.indptr, l.indices, l.values, np.float32(.01), l.inputs) for l in challenge_layers(n, 100)]
        plan = build_plan(SparseNetwork(tuple(ls), cap=32.0), kernel="resident")
        planner._RESIDENT_ENDS = (); fresh()
        yd = jax.device_put(rng.integers(0, 2, (feats, n), np.uint8)); f = jax.jit(categories)
        t = med(lambda: f(plan, yd)); print(f"tail {n} {feats}: {t/100*1e6:.2f} us a layer", flush=True)
if "networks" in what:
    for n, L in ((1024, 120), (1024, 1920), (4096, 120), (16384, 120)):
        y0 = inputs.mnist(".carry/mnist" if False else sys.argv[2], n, 60000)
        yd = jax.device_put(y0)
        plan = build_plan(radixnet.layers(n, L), cap=32.0)
        for ends in ((3, 6, 10, 18), (2, 4, 7, 12, 20), (4, 8, 16), (6, 14), (3, 8, 20), (1, 2, 3, 5, 8, 12, 20)):
            planner._RESIDENT_ENDS = ends; fresh(); f = jax.jit(categories)
            t = med(lambda: f(plan, yd)); print(f"{n}x{L} ends {ends}: {t*1e3:.3f} ms", flush=True)
        a = np.asarray(ops.categories_and_active(plan, yd)[1]) if hasattr(ops, "categories_and_active") else None
        if a is not None: print("active", a[:24].tolist(), flush=True)
        del yd
