"""The devices of runs: their speed, memory, names and prices. Needs no jax.

chips     the table of chips, and its lookups     chip     the columns of the table
tpus      Google's rows                           gpus     NVIDIA's rows
slices    devices that train together             clouds   names on Google Cloud
gpu_targets  GPUs described to the CUDA compiler

To add a chip, add one row to `tpus` or `gpus`.
"""
