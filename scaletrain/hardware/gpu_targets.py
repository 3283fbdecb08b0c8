"""GPUs as the CUDA compiler is told of them, for where there is none.

Facts are of the vendor's architecture white papers and data sheets, but for memory:
CUDA tells of somewhat less than there is.
"""

import dataclasses

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class _Target:
    """What differs between the GPUs a slice may have."""

    name: str  # as jax's `device_kind`
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_bytes: int  # memory a core shares, all of it
    cache_bytes: int  # second level
    clock_ghz: float
    memory_bytes: int  # that CUDA tells of
    memory_bytes_per_s: int


_TARGETS = {
    "a100": _Target(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 164 * 2**10, 40 * 2**20, 1.41,
        int(79.1 * _GIB), 2_039_000_000_000,
    ),
    "h100": _Target(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 228 * 2**10, 50 * 2**20, 1.98,
        int(79.1 * _GIB), 3_350_000_000_000,
    ),
    "h200": _Target(
        "NVIDIA H200", (9, 0), 132, 228 * 2**10, 50 * 2**20, 1.98,
        int(139.8 * _GIB), 4_800_000_000_000,
    ),
    "b200": _Target(
        "NVIDIA B200", (10, 0), 148, 228 * 2**10, 126 * 2**20, 1.97,
        int(178.3 * _GIB), 8_000_000_000_000,
    ),
}  # fmt: skip


def memory_bytes(generation: str) -> int:
    """Returns how much memory a GPU has."""
    return _TARGETS[generation].memory_bytes


def text(generation: str) -> str:
    """Returns a GPU as XLA's `GpuTargetConfigProto` in protobuf's text format."""
    of = _TARGETS[generation]
    major, minor = of.capability
    # Hopper's and Blackwell's matmul units are features of the exact architecture.
    exact = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{of.name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {exact} }}
  core_count: {of.cores}
  fpus_per_core: {128 if major >= 9 else 64}
  clock_rate_ghz: {of.clock_ghz}
  device_memory_size: {of.memory_bytes}
  memory_bandwidth: {of.memory_bytes_per_s}
  l2_cache_size: {of.cache_bytes}
  shared_memory_per_core: {of.shared_bytes}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {of.shared_bytes - 2**10}
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_address_bits: 64
  pcie_bandwidth: 34359738368
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{of.name}"
"""
