"""Slices a run can be planned for: what they are called, hold and connect.

Facts of the TPU rows come from the compiler's own limits and the vendor's pages.
"""

import dataclasses
import difflib
import functools
import math
import re
from typing import Any

import numpy as np

from scaletrain.errors import ConfigError
from scaletrain.hardware import gpu_targets

_GIB = 2**30
# Of any generation, for want of better, and where each is from.
DCN_BYTES_PER_S = 3.1e9  # a chip, between slices
_DCN = "two 100 Gb/s adapters for the 8 chips of a v5e host (Google's page of v6e)"
HOST_BYTES_PER_S = 64e9  # a chip, each way
_HOST = "16 lanes of PCIe 5, an assumption"
_INFINIBAND_BYTES_PER_S = 50e9  # a GPU to another host, one way
_INFINIBAND = "400 Gb/s InfiniBand for each GPU, an assumption"


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as jax shows it, and its links."""

    peak_flops: float  # dense bf16, a second
    hbm_bytes: int  # what a program may use
    hbm_bytes_per_s: float
    link_bytes_per_s: float  # one link, one way
    attention_efficiency: float  # of the peak, of a kernel's products
    chips: float = 1.0  # a device is this much of a chip
    host_chips: int = 4  # chips a host has
    matmul_efficiency: float = 0.85  # of the peak, in the compiler's cycle counts
    memory_efficiency: float = 0.60  # of the bandwidth, likewise
    error_band: str = "not compared with a measured step"


# Where a chip's own figures are from.
_TPU_SHEET = "Google's page of the generation"
_TPU_LINKS = "How to Scale Your Model (JAX), part 2; tpu7x as v5p"
_GPU_SHEET = "NVIDIA's data sheet"
_TPU_SHARES = "the compiler's counts of cycles"
_TPU_SCHEDULE = "the kernel's schedule, as the compiler writes it"
_GPU_SHARES = "what a profile of a step on an H100 showed, see docs/performance.md"


def _allocated(gpu: str) -> int:
    """Returns what `main` lets a run allocate."""
    return int(0.92 * gpu_targets.memory_bytes(gpu))


# What a profile of row 1b of docs/performance.md showed; other GPUs are taken to be
# like the H100. All rows, those in fp8 too, are predicted within 5% with these; 124m,
# whose sequences are the shortest, took 7% longer than predicted.
_gpu = functools.partial(
    Chip,
    attention_efficiency=0.33,
    host_chips=8,
    matmul_efficiency=0.72,
    memory_efficiency=0.78,
)
_MEASURED = "+-5% of measured steps on one and two H100s, more not compared"

# The prediction of TPU steps was compared with published MaxText steps.
_BAND = "+-{} of published FSDP steps, more with a tensor axis"
CHIPS = {
    "v4": Chip(275e12, int(30.75 * _GIB), 1.2e12, 45e9, 0.60),
    "v5e": Chip(
        197e12, int(15.75 * _GIB), 0.81e12, 45e9, 0.88, error_band=_BAND.format("20%")
    ),
    "v5p": Chip(
        459e12, int(95.73 * _GIB), 2.77e12, 90e9, 0.87, error_band=_BAND.format("15%")
    ),
    "v6e": Chip(
        918e12, int(31.24 * _GIB), 1.64e12, 90e9, 0.30, error_band=_BAND.format("20%")
    ),
    "tpu7x": Chip(
        1153.5e12,
        int(94.74 * _GIB),
        3.7e12,
        90e9,
        0.31,
        chips=0.5,
        error_band=_BAND.format("15%"),
    ),
    "a100": _gpu(312e12, _allocated("a100"), 2.0e12, 300e9),
    "h100": _gpu(989e12, _allocated("h100"), 3.35e12, 450e9, error_band=_MEASURED),
    "h200": _gpu(989e12, _allocated("h200"), 4.8e12, 450e9),
    "b200": _gpu(2250e12, _allocated("b200"), 8.0e12, 900e9),
}
GPUS = ("a100", "h100", "h200", "b200")
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_DEEP = (
    "1x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x4x16 4x8x8 4x8x16 8x8x8 8x8x12 "
    "8x8x16 8x16x16 8x8x24 12x12x12 16x16x16 16x16x24"
).split()
SHAPES = {
    "v4": tuple(s for s in _DEEP if s not in ("1x1x1", "16x16x24")),
    "v5e": _FLAT,
    "v5p": tuple(_DEEP),
    "v6e": _FLAT,
    "tpu7x": tuple(_DEEP),
}


@dataclasses.dataclass(frozen=True)
class Cloud:
    """What Google's clouds call slices of a generation."""

    generation: str
    cores: int  # of a chip; accelerator types count them
    runtime: str  # the TPU VM's image; "" where GKE alone has them
    accelerator: str  # GKE's label


_CLOUD = {
    "v4": Cloud("v4", 2, "tpu-ubuntu2204-base", "tpu-v4-podslice"),
    "v5litepod": Cloud("v5e", 1, "v2-alpha-tpuv5-lite", "tpu-v5-lite-podslice"),
    "v5p": Cloud("v5p", 2, "v2-alpha-tpuv5", "tpu-v5p-slice"),
    "v6e": Cloud("v6e", 1, "v2-alpha-tpuv6e", "tpu-v6e-slice"),
    "tpu7x": Cloud("tpu7x", 2, "", "tpu7x"),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Devices that train together: slices of one shape, or GPUs of some hosts."""

    name: str  # as it is asked for, such as v5p:4x4x4
    generation: str
    shape: tuple[int, ...]  # of one slice, in chips
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """A device of it."""
        return CHIPS[self.generation]

    @property
    def is_tpu(self) -> bool:
        """Whether the TPU compiler knows it."""
        return self.generation not in GPUS

    @property
    def platform(self) -> str:
        """Whose compiler compiles for it."""
        return "tpu" if self.is_tpu else "cuda"

    @property
    def chips(self) -> int:
        """Chips of all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def devices(self) -> int:
        """Devices, as jax counts them, of all slices."""
        return round(self.chips / self.chip.chips)

    @property
    def hosts(self) -> int:
        """Machines of one slice; the smallest flat slices share a machine of eight."""
        chips = math.prod(self.shape)
        small = self.is_tpu and len(self.shape) == 2 and chips <= 8
        return 1 if small else -(-chips // self.chip.host_chips)

    @property
    def cloud(self) -> Cloud:
        """What the cloud calls the generation."""
        return next(c for c in _CLOUD.values() if c.generation == self.generation)

    @property
    def accelerator_type(self) -> str:
        """The cloud's name of one slice, such as v5p-128; it implies the shape."""
        name = next(name for name, cloud in _CLOUD.items() if cloud is self.cloud)
        return f"{name}-{self.cloud.cores * math.prod(self.shape)}"

    @property
    def on_vms(self) -> bool:
        """Whether it is to be had as Cloud TPU VMs; GKE has every slice."""
        return bool(self.cloud.runtime) and (
            parse(self.accelerator_type).shape == self.shape
        )

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the compiler is told beside the topology's name."""
        if not self.is_tpu:
            grid = f"1x{self.hosts}x{self.chips // self.hosts}"
            return {
                "topology": grid,
                "target_config": gpu_targets.text(self.generation),
            }
        found: dict[str, Any] = {"wrap": self._wrap()}
        if self.generation == "v4":
            found["chip_config_name"] = "megacore"
        if self.num_slices > 1:
            found["num_slices"] = self.num_slices
        return found

    @property
    def topology(self) -> str:
        """The name the TPU compiler knows it by; GPUs have none."""
        return self.name if self.is_tpu else ""

    @property
    def hbm_bytes(self) -> int:
        """What a program may use of a device's memory."""
        return self.chip.hbm_bytes

    @property
    def peak_flops(self) -> float:
        """Dense bf16 FLOP/s of a device."""
        return self.chip.peak_flops

    @property
    def link_bytes_per_s(self) -> float:
        """What a device sends a second, in all directions, where it is a ring."""
        links = 1 if not self.is_tpu else 2 * len(self.shape)
        return links * self.chip.link_bytes_per_s * self.chip.chips

    def group_bytes_per_s(self, members: np.ndarray) -> float:
        """Returns what a device sends a second to a group of devices by their numbers.

        A ring of the torus sends both ways; a group that spans more dims of the torus
        uses the links of all of them. GPUs of one host have a switch between them, and
        those of a group share the way to other hosts that each has.
        """
        if not self.is_tpu:
            hosts = members // self.chip.host_chips
            away = (hosts == hosts[0]).sum() * _INFINIBAND_BYTES_PER_S
            inside = self.chip.link_bytes_per_s
            return inside if (hosts == hosts[0]).all() else min(inside, away)
        chips = max(1.0, len(members) * self.chip.chips)
        spanned, covered = 0, 1.0
        for size in sorted(self.shape, reverse=True):
            if covered >= chips:
                break
            covered *= size
            spanned += 1
        links = max(1, spanned) * (2 if self._wrap()[0] else 1)
        return links * self.chip.link_bytes_per_s * self.chip.chips

    @property
    def rates(self) -> list[tuple[str, float, str, str]]:
        """What predicted steps rest on: (name, value, unit, source)."""
        chip, tpu = self.chip, self.is_tpu
        sheet = _TPU_SHEET if tpu else _GPU_SHEET
        shares = _TPU_SHARES if tpu else _GPU_SHARES
        kernel = _TPU_SCHEDULE if tpu else _GPU_SHARES
        found = [
            ("bf16 peak", chip.peak_flops / 1e12, "TFLOP/s", sheet),
            ("of it, matmuls", chip.matmul_efficiency, "", shares),
            ("of it, attention", chip.attention_efficiency, "", kernel),
            ("memory", chip.hbm_bytes_per_s / 1e9, "GB/s", sheet),
            ("of it, element-wise", chip.memory_efficiency, "", shares),
            ("host", HOST_BYTES_PER_S / 1e9, "GB/s", _HOST),
        ]
        link = _TPU_LINKS if tpu else sheet
        found.append(("link, one way", chip.link_bytes_per_s / 1e9, "GB/s", link))
        if self.num_slices > 1:
            found.append(("between slices", DCN_BYTES_PER_S / 1e9, "GB/s", _DCN))
        if not tpu and self.hosts > 1:
            away = _INFINIBAND_BYTES_PER_S / 1e9
            found.append(("between hosts", away, "GB/s", _INFINIBAND))
        return found

    @property
    def error_band(self) -> str:
        """How far a predicted step time may be off."""
        return self.chip.error_band

    def _wrap(self) -> tuple[bool, bool, bool]:
        """Returns which dims are rings; without this the compiler assumes none is."""
        if len(self.shape) == 3:
            ring = all(size >= 4 for size in self.shape)
            return ring, ring, ring
        x, y = self.shape
        return x >= 16, y >= 16, False


def parse(text: str, num_slices: int = 1) -> Slice:
    """Returns the slice of a name such as v5p:4x4x4, v6e-256 or h100:8.

    Raises:
      ConfigError: there is no such slice; with the nearest that is.
    """
    where = f"--topology={text}"
    found = re.fullmatch(r"([a-z0-9]+)([:-])([0-9x]+)", text.lower())
    names = sorted({*CHIPS, *_CLOUD})
    if num_slices < 1:
        raise ConfigError([f"--num_slices={num_slices}; below 1; give 1 or more."])
    if not found or found[1] not in names:
        kind = re.split("[:-]", text.lower())[0]
        near = difflib.get_close_matches(kind, names, 1, 0.3)
        hint = _example(near[0] if near else "v5p")
        raise ConfigError(
            [
                f"{where}; unknown; write GENERATION:SHAPE with one of "
                f"{', '.join(CHIPS)}, such as {hint}."
            ]
        )
    name, mark, size = found.groups()
    if name in GPUS:
        return _gpus(where, name, size, num_slices)
    if mark == "-":
        name, size = _shape_of(where, name, size)
    if name not in SHAPES:
        raise ConfigError([f"{where}; a cloud's name; write {name}-CHIPS."])
    if size not in SHAPES[name]:
        near = _nearest(size, SHAPES[name])
        raise ConfigError(
            [f"{where}; {name} has no such slice; the nearest is {name}:{near}."]
        )
    shape = tuple(map(int, size.split("x")))
    return Slice(f"{name}:{size}", name, shape, num_slices)


def _example(name: str) -> str:
    if name in GPUS:
        return f"{name}:8"
    generation = _CLOUD[name].generation if name in _CLOUD else name
    return f"{generation}:{'4x4' if SHAPES[generation] is _FLAT else '4x4x4'}"


def _gpus(where: str, name: str, size: str, num_slices: int) -> Slice:
    if "x" in size or int(size) < 1 or (int(size) > 8 and int(size) % 8):
        raise ConfigError([f"{where}; give 1 to 8 GPUs, or hosts of 8, as {name}:16."])
    if num_slices > 1:
        raise ConfigError(
            [f"--num_slices={num_slices}; GPUs have none; give {name}:COUNT alone."]
        )
    return Slice(f"{name}:{size}", name, (int(size),))


def _shape_of(where: str, name: str, size: str) -> tuple[str, str]:
    """Returns the generation and the shape behind a cloud's name."""
    if name not in _CLOUD or "x" in size:
        raise ConfigError([f"{where}; write {name}:{size} for a shape."])
    cloud = _CLOUD[name]
    generation = cloud.generation
    sizes = {cloud.cores * _chips(shape): shape for shape in _squarest_last(generation)}
    if int(size) not in sizes:
        near = min(sizes, key=lambda count: abs(count - int(size)))
        raise ConfigError(
            [f"{where}; no slice has that size; the nearest is {name}-{near}."]
        )
    return generation, sizes[int(size)]


def _squarest_last(generation: str) -> list[str]:
    """Returns shapes so that the last of a size is the one that the cloud takes."""
    return sorted(SHAPES[generation], key=lambda s: -sum(map(int, s.split("x"))))


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def _nearest(size: str, shapes: tuple[str, ...]) -> str:
    """Returns the shape with the nearest number of chips, the squarest of those."""
    asked = [int(word) for word in size.split("x") if word]
    count = math.prod(asked)

    def distance(shape: str) -> tuple[float, int]:
        dims = map(int, shape.split("x"))
        return abs(math.log(max(count, 1) / _chips(shape))), sum(dims)

    return min(shapes, key=distance)
