"""Hand-written kernels for operations in which XLA reads memory more often than needed.

Each kernel has a test, `supports(...)` or `matmul.takes(...)`: whether the devices of
the mesh in use can run it with given sizes and formats. Models call the test, so that
they contain no names of platforms.
"""
