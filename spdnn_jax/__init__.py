"""Inference of large sparse deep neural networks in JAX, through fused XLA custom calls for CPU and CUDA."""

import sys
from pathlib import Path


def _is_command() -> bool:
    """Whether this import begins the program `spdnn`, or ``python -m spdnn_jax``, which Python still looks for then."""
    program = sys.argv[0] if sys.argv else ""
    return Path(program).stem == "spdnn" or (program == "-m" and __name__ in sys.orig_argv)


if _is_command():
    from spdnn_jax import _interrupts

    _interrupts.watch()

try:
    from spdnn_jax.activation import Clip
    from spdnn_jax.distributed.mesh import categories_sharded, feature_mesh, infer_sharded, replicate
    from spdnn_jax.exporting import export_checks
    from spdnn_jax.features import pack_bits
    from spdnn_jax.network import SparseLayer, SparseNetwork
    from spdnn_jax.ops import apply, categories, infer, layer
    from spdnn_jax.plan import Plan, build_plan
    from spdnn_jax.training import trainable, with_weights
except ImportError as error:  # no native core, or one that the installed jaxlib is too old for
    if not _is_command():
        raise
    sys.exit(f"spdnn: error: {' '.join(str(error).split())}")

__all__ = [
    "Clip",
    "Plan",
    "SparseLayer",
    "SparseNetwork",
    "apply",
    "build_plan",
    "categories",
    "categories_sharded",
    "export_checks",
    "feature_mesh",
    "infer",
    "infer_sharded",
    "layer",
    "pack_bits",
    "replicate",
    "trainable",
    "with_weights",
]
__version__ = "0.1.0"
