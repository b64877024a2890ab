"""``python -m spdnn_jax``."""

from spdnn_jax.app import main

main()
