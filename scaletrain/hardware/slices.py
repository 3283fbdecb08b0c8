"""Devices that train together, by the name in --topology, and the links they share."""

import dataclasses
import difflib
import math
import re
from collections.abc import Sequence
from typing import Any

from scaletrain.errors import ConfigError
from scaletrain.hardware import clouds, gpu_targets
from scaletrain.hardware.chip import Chip, Tpu
from scaletrain.hardware.chips import CHIPS


@dataclasses.dataclass(frozen=True)
class Slice:
    """TPU slices of one shape, or the GPUs of some hosts."""

    name: str  # in --topology, such as v5p:4x4x4
    generation: str
    shape: tuple[int, ...]  # of one slice, in chips
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """Its kind of chip."""
        return CHIPS[self.generation]

    @property
    def is_tpu(self) -> bool:
        """Whether it consists of TPUs."""
        return self.chip.tpu is not None

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
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """Machines of one slice."""
        chips, tpu = math.prod(self.shape), self.chip.tpu
        if tpu and chips <= tpu.largest_machine:
            return 1
        return -(-chips // self.chip.chips_per_host)

    @property
    def topology(self) -> str:
        """The name the TPU compiler knows it by; GPUs have none."""
        return self.name if self.is_tpu else ""

    @property
    def kwargs(self) -> dict[str, Any]:
        """What the compiler is told beside the topology's name."""
        tpu = self.chip.tpu
        if tpu is None:
            grid = f"1x{self.hosts}x{self.chips // self.hosts}"
            return {"topology": grid, "target_config": gpu_targets.text(self.chip)}
        kwargs: dict[str, Any] = {"wrap": self._wrap()}
        if tpu.chip_config:
            kwargs["chip_config_name"] = tpu.chip_config
        if self.num_slices > 1:
            kwargs["num_slices"] = self.num_slices
        return kwargs

    @property
    def link_bytes_per_s(self) -> float:
        """What a device sends a second, in all directions, where it is a ring."""
        links = 2 * len(self.shape) if self.is_tpu else 1
        return links * self.chip.link_bytes_per_s / self.chip.devices_per_chip

    def group_bytes_per_s(self, members: Sequence[int]) -> float:
        """Returns what a device sends a second to a group of devices by their numbers.

        A ring of the torus sends both ways; a group that spans more dims of the torus
        uses the links of all of them. GPUs of one host have a switch between them, and
        those of a group share the way to other hosts that each has.
        """
        chip = self.chip
        if not self.is_tpu:
            hosts = [member // chip.chips_per_host for member in members]
            near = hosts.count(hosts[0])
            away = near * chip.network_bytes_per_s
            inside = chip.link_bytes_per_s
            return inside if near == len(hosts) else min(inside, away)
        chips = max(1.0, len(members) / chip.devices_per_chip)
        spanned, covered = 0, 1.0
        for size in sorted(self.shape, reverse=True):
            if covered >= chips:
                break
            covered *= size
            spanned += 1
        links = max(1, spanned) * (2 if self._wrap()[0] else 1)
        return links * chip.link_bytes_per_s / chip.devices_per_chip

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
    flag = f"--topology={text}"
    match = re.fullmatch(r"([a-z0-9]+)([:-])([0-9x]+)", text.lower())
    names = sorted({*CHIPS, *clouds.BY_NAME})
    if num_slices < 1:
        raise ConfigError([f"--num_slices={num_slices}; below 1; give 1 or more."])
    if not match or match[1] not in names:
        kind = re.split("[:-]", text.lower())[0]
        near = difflib.get_close_matches(kind, names, 1, 0.3)
        hint = _example(near[0] if near else "v5p")
        raise ConfigError(
            [
                f"{flag}; unknown; write GENERATION:SHAPE with one of "
                f"{', '.join(CHIPS)}, such as {hint}."
            ]
        )
    name, mark, size = match.groups()
    if name in CHIPS and CHIPS[name].gpu:
        return _gpus(flag, name, size, num_slices)
    if mark == "-":
        name, size = _of_cloud(flag, name, size)
    tpu = CHIPS[name].tpu if name in CHIPS else None
    if tpu is None:
        raise ConfigError([f"{flag}; a cloud's name; write {name}-CHIPS."])
    if size not in tpu.shapes:
        near = _nearest(size, tpu)
        raise ConfigError(
            [f"{flag}; {name} has no such slice; the nearest is {name}:{near}."]
        )
    return Slice(f"{name}:{size}", name, clouds.dims(size), num_slices)


def _example(name: str) -> str:
    chip = CHIPS.get(name) or clouds.BY_NAME[name]
    if chip.tpu is None:
        return f"{name}:8"
    shape = "4x4" if "4x4" in chip.tpu.shapes else "4x4x4"
    return f"{chip.generation}:{shape}"


def _gpus(flag: str, name: str, size: str, num_slices: int) -> Slice:
    host = CHIPS[name].chips_per_host
    if "x" in size or int(size) < 1 or (int(size) > host and int(size) % host):
        raise ConfigError(
            [
                f"{flag}; give 1 to {host} GPUs, or hosts of {host}, "
                f"as {name}:{2 * host}."
            ]
        )
    if num_slices > 1:
        raise ConfigError(
            [f"--num_slices={num_slices}; GPUs have none; give {name}:COUNT alone."]
        )
    return Slice(f"{name}:{size}", name, (int(size),))


def _of_cloud(flag: str, name: str, size: str) -> tuple[str, str]:
    """Returns the generation and the shape behind an accelerator type."""
    chip = clouds.BY_NAME.get(name)
    if chip is None or chip.tpu is None or "x" in size:
        raise ConfigError([f"{flag}; write {name}:{size} for a shape."])
    shapes = clouds.default_shapes(chip.tpu)
    if int(size) not in shapes:
        near = min(shapes, key=lambda count: abs(count - int(size)))
        raise ConfigError(
            [f"{flag}; no slice has that size; the nearest is {name}-{near}."]
        )
    return chip.generation, shapes[int(size)]


def _nearest(size: str, tpu: Tpu) -> str:
    """Returns the shape with the nearest number of chips, the squarest of those."""
    count = math.prod(int(word) for word in size.split("x") if word)

    def distance(shape: str) -> tuple[float, int]:
        dims = clouds.dims(shape)
        return abs(math.log(max(count, 1) / math.prod(dims))), sum(dims)

    return min(tpu.shapes, key=distance)
