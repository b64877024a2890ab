"""Networks and arrays in files of many forms, and dense weights made sparse."""

from spdnn_jax.io.arrays import read_array
from spdnn_jax.io.networks import read_network
from spdnn_jax.io.prune import prune_dense

__all__ = ["prune_dense", "read_array", "read_network"]
