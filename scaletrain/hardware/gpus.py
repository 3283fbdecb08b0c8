"""NVIDIA's rows of the table of chips.

Facts for the compiler are from the vendor's architecture white papers and data sheets,
but memory is as CUDA reports it, which is somewhat less than the data sheet says.
"""

import functools

from scaletrain.hardware.chip import GIB, Chip, Figure, Gpu, Rates

MEMORY_FRACTION = 0.92  # of a GPU's memory: `main` lets a run allocate this much
_SHEET = "NVIDIA's data sheet"
_PROFILE = "what a profile of a step on an H100 showed, see docs/performance.md"
_AMAZON = "AWS list price, N. Virginia, 2026-07: {} at ${} an hour / 8"
_TDP = "vendor's data sheet: TDP of the {} module"
_HOST_WATTS = Figure(575.0, "estimate: DGX H100 10.2 kW less 8 x 700 W, a GPU")

_HOPPER = Gpu(
    capability=(9, 0),
    cores=132,
    shared_bytes=228 * 2**10,
    cache_bytes=50 * 2**20,
    clock_ghz=1.98,
)
_HOPPER_OPTIONS = {
    # cuBLAS matmuls instead of Triton ones: 7% of a step of 1.1B on an H100.
    "xla_gpu_enable_triton_gemm": False,
    # Collectives that overlap with matmuls: two H100 with FSDP take 442 ms a step of
    # 1.1B instead of 446; 440 ms with the collectives of some layers combined.
    "xla_gpu_enable_latency_hiding_scheduler": True,
    "xla_gpu_all_gather_combine_threshold_bytes": 2**30,
    "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**30,
    # Buffers that the loop over layers overwrites completely are not filled with zeros
    # first: 473 ms instead of 482 a step of 1.1B with layers scanned.
    "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
}

# The efficiencies are from a profile of row 1b of docs/performance.md, on an H100;
# other GPUs are taken to be like it. All rows, those in fp8 too, are predicted within
# 5%, but for 124m, whose sequences are the shortest: it took 7% longer than predicted.
_gpu = functools.partial(
    Chip,
    memory_fraction=MEMORY_FRACTION,
    network_bytes_per_s=Figure(50e9, "400 Gb/s InfiniBand for each GPU, an assumption"),
    matmul_efficiency=Figure(0.72, _PROFILE),
    attention_efficiency=Figure(0.33, _PROFILE),
    memory_efficiency=Figure(0.78, _PROFILE),
    chips_per_host=8,
)

GPUS = (
    _gpu(
        generation="a100",
        # The 40 GB model has the same peak; memory and bandwidth are of the 80 GB one.
        device_kinds=("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB"),
        peak_flops=Figure(312e12, _SHEET),
        memory_bytes=int(79.1 * GIB),
        hbm_bytes_per_s=Figure(2.039e12, _SHEET),
        link_bytes_per_s=Figure(300e9, _SHEET),
        rates=Rates(
            dollars=Figure(3.40, "estimate: on demand at a large cloud, 2025"),
            spot=None,
            watts=Figure(400.0, _TDP.format("SXM4")),
            host_watts=Figure(412.0, "estimate: DGX A100 6.5 kW less 8 x 400 W, a GPU"),
        ),
        gpu=Gpu(
            capability=(8, 0),
            cores=108,
            shared_bytes=164 * 2**10,
            cache_bytes=40 * 2**20,
            clock_ghz=1.41,
        ),
    ),
    _gpu(
        generation="h100",
        device_kinds=("NVIDIA H100 80GB HBM3",),
        peak_flops=Figure(989e12, _SHEET),
        low_precision={"fp8": 2},
        memory_bytes=int(79.1 * GIB),
        hbm_bytes_per_s=Figure(3.35e12, _SHEET),
        link_bytes_per_s=Figure(450e9, _SHEET),
        error_band="+-5% of measured steps on one and two H100s, more not compared",
        compiler_options=_HOPPER_OPTIONS,
        rates=Rates(
            dollars=Figure(6.88, _AMAZON.format("p5.48xlarge", "55.04")),
            spot=Figure(2.50, "estimate: spot at a large cloud, 2025"),
            watts=Figure(
                685.0, "measured: 685 W of 700 W under bf16 matmuls, 2026-11-23"
            ),
            host_watts=_HOST_WATTS,
        ),
        gpu=_HOPPER,
    ),
    _gpu(
        generation="h200",
        device_kinds=("NVIDIA H200",),
        peak_flops=Figure(989e12, _SHEET),
        low_precision={"fp8": 2},
        memory_bytes=int(139.8 * GIB),
        hbm_bytes_per_s=Figure(4.8e12, _SHEET),
        link_bytes_per_s=Figure(450e9, _SHEET),
        compiler_options=_HOPPER_OPTIONS,
        rates=Rates(
            dollars=Figure(7.91, _AMAZON.format("p5en.48xlarge", "63.30")),
            spot=None,
            watts=Figure(700.0, _TDP.format("SXM")),
            host_watts=_HOST_WATTS,
        ),
        gpu=_HOPPER,
    ),
    _gpu(
        generation="b200",
        device_kinds=("NVIDIA B200",),
        peak_flops=Figure(2250e12, _SHEET),
        low_precision={"fp8": 2},
        memory_bytes=int(178.3 * GIB),
        hbm_bytes_per_s=Figure(8.0e12, _SHEET),
        link_bytes_per_s=Figure(900e9, _SHEET),
        rates=Rates(
            dollars=Figure(14.24, _AMAZON.format("p6-b200.48xlarge", "113.93")),
            spot=None,
            watts=Figure(1000.0, _TDP.format("SXM")),
            host_watts=_HOST_WATTS,
        ),
        gpu=Gpu(
            capability=(10, 0),
            cores=148,
            shared_bytes=228 * 2**10,
            cache_bytes=126 * 2**20,
            clock_ghz=1.97,
        ),
    ),
)
