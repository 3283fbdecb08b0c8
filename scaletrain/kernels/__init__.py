"""Kernels written by hand, where a compiler reads memory more often than it has to."""
