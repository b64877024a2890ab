"""The program `spdnn`."""
