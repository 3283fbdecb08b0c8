"""Descriptions of GPUs for the CUDA compiler on a machine without GPUs."""

from scaletrain.hardware.chip import Chip


def text(chip: Chip) -> str:
    """Returns XLA's `GpuTargetConfigProto` of a GPU, in protobuf's text format."""
    gpu, name = chip.gpu, chip.device_kinds[0]
    assert gpu is not None, f"{chip.generation} is no GPU"
    major, minor = gpu.capability
    # Hopper's and Blackwell's matmul units are features of the exact architecture.
    exact = "feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"
  cuda_compute_capability {{ major: {major} minor: {minor} {exact} }}
  core_count: {gpu.cores}
  fpus_per_core: {128 if major >= 9 else 64}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {chip.memory_bytes}
  memory_bandwidth: {int(chip.hbm_bytes_per_s)}
  l2_cache_size: {gpu.cache_bytes}
  shared_memory_per_core: {gpu.shared_bytes}
  shared_memory_per_block: {48 * 2**10}
  shared_memory_per_block_optin: {gpu.shared_bytes - 2**10}
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
device_description_str: "{name}"
"""
