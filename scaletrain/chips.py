"""What is known of the chips a run may meet, by jax's `device_kind`."""

# Dense bf16 FLOP/s of one jax device (TPU v7x shows two devices a chip). Sources: the
# vendors' data sheets; a chip that is not listed has no MFU rather than a guess.
BF16_PEAK_FLOPS = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 1153.5e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}

# How many times faster than bf16 a chip multiplies 8-bit numbers, by the same sources;
# what is not listed does not, or not faster. A CPU emulates both, for tests.
LOW_PRECISION = {
    "cpu": {"fp8": 1, "int8": 1},
    "TPU v5 lite": {"int8": 2},
    "TPU v5e": {"int8": 2},
    "TPU v5": {"int8": 2},
    "TPU v5p": {"int8": 2},
    "TPU v6 lite": {"int8": 2},
    "TPU v6e": {"int8": 2},
    "TPU7x": {"fp8": 2},
    "NVIDIA H100 80GB HBM3": {"fp8": 2},
    "NVIDIA H200": {"fp8": 2},
    "NVIDIA B200": {"fp8": 2},
}

# Those whose warpgroups multiply what lies in shared memory, see `kernels.matmul`.
HOPPER = ("NVIDIA H100 80GB HBM3", "NVIDIA H200")

# Compiler options of the train step by device kind, each with its reason. One that the
# installed compiler does not know is named, and left out.
_NO_WINDOWED_EINSUM = {
    # Without it XLA cuts an FSDP gathering into matmuls of slices 128 wide when a
    # tensor axis is there too: 7.9 s instead of 3.9 s a step of Llama 8B on v5p:4x4x4.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_SPARSE_CORE_GATHERS = {
    # Weights are gathered by the SparseCores while matmuls run, instead of before, by
    # the compiler's schedule: 7.70 s instead of 7.90 s a step of Llama 8B on v5p:4x4x4,
    # 0.242 s instead of 0.258 s for four layers of it on v6e:4x4. Offloaded sums are
    # left alone: others saw wrong losses with them.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
}
_V5P = (
    _NO_WINDOWED_EINSUM
    | _SPARSE_CORE_GATHERS
    | {
        # Without it gatherings over all of a torus of three dims stay as they are.
        "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
    }
)
_TRILLIUM = (
    _NO_WINDOWED_EINSUM
    | _SPARSE_CORE_GATHERS
    | {
        # Larger matmul tiles: 1.66 s instead of 2.56 s of a step of Llama 8B on v6e:2x4
        # by the compiler's cycles. Generating the code takes three times as long.
        "xla_tpu_scoped_vmem_limit_kib": 98_304,
    }
)
_HOPPER = {
    # The vendor's matmuls instead of generated ones: 7% of a step of 1.1B on an H100.
    "xla_gpu_enable_triton_gemm": False,
    # Gatherings and sums beside matmuls: two H100 with FSDP take 442 ms a step of 1.1B
    # instead of 446; 440 ms with some layers' at once.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    # What the loop over layers writes whole is not filled with zeros first: 473 ms
    # instead of 482 a step of 1.1B with layers scanned.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}
COMPILER_OPTIONS = {
    "TPU v4": _NO_WINDOWED_EINSUM,
    "TPU v5 lite": _NO_WINDOWED_EINSUM,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _TRILLIUM,
    "TPU v6e": _TRILLIUM,
    "TPU7x": _NO_WINDOWED_EINSUM,
    **dict.fromkeys(HOPPER, _HOPPER),
}

# Queries and keys in a block of the TPU's attention kernel. A larger block pays less
# for itself, a smaller one wastes less above the diagonal and fits the fast memory: a
# v5p's does not hold 2048. Beside each the cycles of 512 x 512 scores, forward and
# backward, by the compiler's schedule at heads of 128; in brackets those with blocks
# of 512 and a kernel for the queries' gradients alone.
SPLASH_BLOCKS = {
    "TPU v4": 1024,  # 6030 (9298)
    "TPU v5 lite": 1024,  # 4054 (5838)
    "TPU v5": 1024,  # 4106 (6434)
    "TPU v6 lite": 1024,  # 3010 (4524)
    "TPU7x": 1024,  # 2886 (4527)
}


def does_not_fit(said: str) -> bool:
    """Whether a compiler or allocator says that a device's memory is too small.

    Of a TPU's fast memory, `vmem`, the same is said: there a kernel's blocks are too
    large, and nothing that makes a step smaller helps.
    """
    exhausted = "RESOURCE_EXHAUSTED" in said or "Out of memory" in said  # a CPU's
    return exhausted and "memory space vmem" not in said
