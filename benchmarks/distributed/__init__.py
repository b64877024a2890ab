"""Runs on several devices, and of weights that are streamed to one."""
