"""A generation of chips: its facts, and the source of each number."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

GIB = 2**30


class Figure(float):
    """A number with the source from which it is taken."""

    source: str

    def __new__(cls, value: float, source: str) -> Self:
        """Returns `value` with its source."""
        figure = super().__new__(cls, value)
        figure.source = source
        return figure


PCIE = Figure(64e9, "16 lanes of PCIe 5, an assumption")


@dataclasses.dataclass(frozen=True)
class Rates:
    """The price and the power of one chip."""

    dollars: Figure  # on demand, an hour
    spot: Figure | None  # preemptible, an hour; None where no list price is known
    watts: Figure  # of the chip under load
    host_watts: Figure  # its share of the host, network and cooling fans


@dataclasses.dataclass(frozen=True)
class Cloud:
    """The names that Google Cloud gives a generation of TPUs."""

    name: str  # of accelerator types, such as v5p in v5p-128
    cores: int  # of a chip; accelerator types count them
    runtime: str  # the TPU VM's image; "" where GKE alone has the generation
    accelerator: str  # GKE's label


@dataclasses.dataclass(frozen=True)
class Tpu:
    """The facts that only TPUs have."""

    cloud: Cloud
    shapes: tuple[str, ...]  # of slices, in chips
    splash_block: int  # queries, and keys, of a block in the splash attention kernel
    largest_machine: int = 4  # chips of the largest slice that is one machine
    chip_config: str = ""  # the compiler's name for two cores as one device


@dataclasses.dataclass(frozen=True)
class Gpu:
    """The facts that only GPUs have, for the CUDA compiler."""

    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    shared_bytes: int  # shared memory of a core
    cache_bytes: int  # L2
    clock_ghz: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """A generation of chips; jax's device is one chip or a part of one."""

    generation: str  # the name in --topology
    device_kinds: tuple[str, ...]  # jax's names of a device
    peak_flops: Figure  # dense bf16 FLOP/s of a device
    # Speed of 8-bit matmuls over bf16, by format, from the source of the peak. A chip
    # does not multiply the formats that are not listed, or not faster than bf16.
    low_precision: Mapping[str, float] = dataclasses.field(default_factory=dict)
    memory_bytes: int  # of a device: the TPU compiler's limit, or as CUDA reports it
    memory_fraction: float = 1.0  # of the memory, for programs
    hbm_bytes_per_s: Figure  # of a device
    link_bytes_per_s: Figure  # of a chip: one link, one way
    network_bytes_per_s: Figure  # of a chip, one way: to other slices, or other hosts
    host_bytes_per_s: Figure = PCIE  # of a chip, each way: to the memory of its host
    matmul_efficiency: Figure  # of the peak
    attention_efficiency: Figure  # of the peak: the products of the kernel
    memory_efficiency: Figure  # of the bandwidth: element-wise operations
    error_band: str = "not compared with a measured step"  # of a predicted step time
    devices_per_chip: int = 1
    chips_per_host: int
    # Of the train step. An option that the installed compiler does not know is left
    # out, with a warning.
    compiler_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rates: Rates
    tpu: Tpu | None = None
    gpu: Gpu | None = None

    @property
    def hbm_bytes(self) -> int:
        """Bytes of a device's memory for programs."""
        return int(self.memory_fraction * self.memory_bytes)

    @property
    def is_hopper(self) -> bool:
        """Whether the chip is a Hopper GPU, for which `kernels.matmul` is written."""
        return self.gpu is not None and self.gpu.capability == (9, 0)
