"""Sparse layers to train, as modules: `spdnn_jax.nn.flax` for Flax NNX, `spdnn_jax.nn.equinox` for Equinox."""
