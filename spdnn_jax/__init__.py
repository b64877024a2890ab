"""Inference of large sparse deep neural networks in JAX, through fused XLA custom calls for CPU and CUDA."""

from spdnn_jax.network import SparseLayer, SparseNetwork
from spdnn_jax.ops import categories, infer, layer
from spdnn_jax.parallel import categories_sharded, feature_mesh, infer_sharded, replicate
from spdnn_jax.plan import Plan, build_plan

__all__ = [
    "Plan",
    "SparseLayer",
    "SparseNetwork",
    "build_plan",
    "categories",
    "categories_sharded",
    "feature_mesh",
    "infer",
    "infer_sharded",
    "layer",
    "replicate",
]
__version__ = "0.1.0"
