"""The devices that runs use: what they do, hold, are called and cost. Needs no jax.

chips     the table of chips, and its lookups     chip     what a row of it has
tpus      Google's rows                           gpus     NVIDIA's rows
slices    devices that train together             clouds   what Google Cloud calls them
gpu_targets  GPUs described to the CUDA compiler

A chip is added by one row in `tpus` or `gpus`.
"""
