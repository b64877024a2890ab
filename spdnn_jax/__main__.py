"""``python -m spdnn_jax``."""

from spdnn_jax.command_line.app import main

main()
