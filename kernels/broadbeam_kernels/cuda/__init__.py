"""Kernels in CUDA C++, compiled for the device at their first use; Triton's stand in where that fails."""
