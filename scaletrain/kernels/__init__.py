"""Kernels written by hand, where a compiler reads memory more often than it has to.

Each file has a `supports(...)`: whether the devices of the mesh in use run its kernel
for these sizes and formats. Models ask it, and know of no platform.
"""
