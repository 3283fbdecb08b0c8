"""Google's rows of the table of chips.

The memory and the shapes of a row are the limits of the TPU compiler.
"""

import functools

from scaletrain.hardware.chip import GIB, Chip, Cloud, Figure, Rates, Tpu

_SHEET = "Google's page of the generation"
_LINKS = "How to Scale Your Model (JAX), part 2; tpu7x as v5p"
_CYCLES = "the compiler's counts of cycles"
_SCHEDULE = "the kernel's schedule, as the compiler writes it"
_PRICES = "Google Cloud's price list, {}, as in SkyPilot's catalog v8, read 2026-11"
_EAST = _PRICES.format("us-east5")
_OKLAHOMA = _PRICES.format("us-central2")
_ADAPTERS = "two 100 Gb/s adapters for the 8 chips of a v5e host (Google's page of v6e)"
_HOST_WATTS = Figure(60.0, "estimate: a 240 W host share for 4 chips")
# The prediction of TPU steps was compared with published MaxText steps.
_BAND = "+-{} of published FSDP steps, more with a tensor axis"

_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    "1x1x1", "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x16", "4x8x8",
    "4x8x16", "8x8x8", "8x8x12", "8x8x16", "8x16x16", "8x8x24", "12x12x12", "16x16x16",
    "16x16x24",
)  # fmt: skip

_NO_WINDOWED_EINSUM = {
    # Otherwise XLA splits an FSDP all-gather into matmuls of slices 128 wide when the
    # mesh also has a tensor axis: a step of Llama 8B on v5p:4x4x4 takes 7.9 s, not 3.9.
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": 1_000_000,
}
_SPARSE_CORE_GATHERS = {
    # The SparseCores gather the weights while matmuls run, instead of before them. By
    # the compiler's schedule: 7.70 s instead of 7.90 s a step of Llama 8B on v5p:4x4x4,
    # 0.242 s instead of 0.258 s for four layers of it on v6e:4x4. Reductions are not
    # offloaded, because others saw wrong losses with offloaded ones.
    "xla_tpu_enable_sparse_core_collective_offload_all_gather": True,
}

_tpu = functools.partial(
    Chip,
    network_bytes_per_s=Figure(3.1e9, _ADAPTERS),
    matmul_efficiency=Figure(0.85, _CYCLES),
    memory_efficiency=Figure(0.60, _CYCLES),
    chips_per_host=4,
)

# splash_block: a larger block has less overhead; a smaller one wastes less above the
# diagonal and fits into VMEM, which is too small for 2048 on a v5p. The comment of each
# row gives the cycles for 512 x 512 scores, forward and backward, by the compiler's
# schedule for heads of 128; in brackets, those with blocks of 512 and a separate kernel
# for the gradients of the queries.
TPUS = (
    _tpu(
        generation="v4",
        device_kinds=("TPU v4",),
        peak_flops=Figure(275e12, _SHEET),
        memory_bytes=int(30.75 * GIB),
        hbm_bytes_per_s=Figure(1.2e12, _SHEET),
        link_bytes_per_s=Figure(45e9, _LINKS),
        attention_efficiency=Figure(0.60, _SCHEDULE),
        compiler_options=_NO_WINDOWED_EINSUM,
        rates=Rates(
            dollars=Figure(3.22, _OKLAHOMA),
            spot=Figure(0.92, _OKLAHOMA),
            watts=Figure(192.0, "arXiv 2304.01433 table 4: 192 W mean under load"),
            host_watts=_HOST_WATTS,
        ),
        tpu=Tpu(
            cloud=Cloud("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
            shapes=tuple(s for s in _DEEP if s not in ("1x1x1", "16x16x24")),
            splash_block=1024,  # 6030 (9298)
            chip_config="megacore",
        ),
    ),
    _tpu(
        generation="v5e",
        device_kinds=("TPU v5 lite", "TPU v5e"),
        peak_flops=Figure(197e12, _SHEET),
        low_precision={"int8": 2},
        memory_bytes=int(15.75 * GIB),
        hbm_bytes_per_s=Figure(0.81e12, _SHEET),
        link_bytes_per_s=Figure(45e9, _LINKS),
        attention_efficiency=Figure(0.88, _SCHEDULE),
        error_band=_BAND.format("20%"),
        compiler_options=_NO_WINDOWED_EINSUM,
        rates=Rates(
            dollars=Figure(1.20, _EAST),
            spot=Figure(0.60, _EAST),
            watts=Figure(
                170.0, "estimate: no figure is published; half of v5p, by peak and die"
            ),
            host_watts=_HOST_WATTS,
        ),
        tpu=Tpu(
            cloud=Cloud("v5litepod", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
            shapes=_FLAT,
            splash_block=1024,  # 4054 (5838)
            largest_machine=8,
        ),
    ),
    _tpu(
        generation="v5p",
        device_kinds=("TPU v5", "TPU v5p"),
        peak_flops=Figure(459e12, _SHEET),
        low_precision={"int8": 2},
        memory_bytes=int(95.73 * GIB),
        hbm_bytes_per_s=Figure(2.77e12, _SHEET),
        link_bytes_per_s=Figure(90e9, _LINKS),
        attention_efficiency=Figure(0.87, _SCHEDULE),
        error_band=_BAND.format("15%"),
        compiler_options=_NO_WINDOWED_EINSUM
        | _SPARSE_CORE_GATHERS
        | {
            # Otherwise all-gathers over all three dims of the torus are not offloaded.
            "xla_tpu_enable_sparse_core_collective_offload_3d_all_gather": True,
        },
        rates=Rates(
            dollars=Figure(4.20, _EAST),
            spot=Figure(1.68, _EAST),
            watts=Figure(
                350.0, "estimate: no figure is published; v4 scaled by peak FLOP/s"
            ),
            host_watts=_HOST_WATTS,
        ),
        tpu=Tpu(
            cloud=Cloud("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
            shapes=_DEEP,
            splash_block=1024,  # 4106 (6434)
        ),
    ),
    _tpu(
        generation="v6e",
        device_kinds=("TPU v6 lite", "TPU v6e"),
        peak_flops=Figure(918e12, _SHEET),
        low_precision={"int8": 2},
        memory_bytes=int(31.24 * GIB),
        hbm_bytes_per_s=Figure(1.64e12, _SHEET),
        link_bytes_per_s=Figure(90e9, _LINKS),
        attention_efficiency=Figure(0.30, _SCHEDULE),
        error_band=_BAND.format("20%"),
        compiler_options=_NO_WINDOWED_EINSUM
        | _SPARSE_CORE_GATHERS
        | {
            # Larger matmul tiles: by the compiler's cycles 1.66 s instead of 2.56 s a
            # step of Llama 8B on v6e:2x4. Code generation takes three times as long.
            "xla_tpu_scoped_vmem_limit_kib": 98_304,
        },
        rates=Rates(
            dollars=Figure(2.70, _EAST),
            spot=Figure(1.22, _EAST),
            watts=Figure(
                300.0, "estimate: v5e x 4.7 the peak / 67% better energy efficiency"
            ),
            host_watts=_HOST_WATTS,
        ),
        tpu=Tpu(
            cloud=Cloud("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
            shapes=_FLAT,
            splash_block=1024,  # 3010 (4524)
            largest_machine=8,
        ),
    ),
    _tpu(
        generation="tpu7x",
        device_kinds=("TPU7x",),
        devices_per_chip=2,
        peak_flops=Figure(1153.5e12, _SHEET),
        low_precision={"fp8": 2},
        memory_bytes=int(94.74 * GIB),
        hbm_bytes_per_s=Figure(3.7e12, _SHEET),
        link_bytes_per_s=Figure(90e9, _LINKS),
        attention_efficiency=Figure(0.31, _SCHEDULE),
        error_band=_BAND.format("15%"),
        compiler_options=_NO_WINDOWED_EINSUM,
        rates=Rates(
            dollars=Figure(
                12.0, "estimate: no list price is known to this table, 2025"
            ),
            spot=None,
            watts=Figure(
                960.0,
                "estimate: about 10 MW for a 9,216-chip pod, as announced, less "
                "hosts, 2025",
            ),
            host_watts=_HOST_WATTS,
        ),
        tpu=Tpu(
            cloud=Cloud("tpu7x", 2, "", "tpu7x"),
            shapes=_DEEP,
            splash_block=1024,  # 2886 (4527)
        ),
    ),
)
