"""The CUDA kernels: measured on one GPU, and under compute-sanitizer."""
