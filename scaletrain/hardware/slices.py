"""The devices that train together, named as in --topology, and their links."""

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
    """The devices of a run: TPU slices of one shape, or GPUs of one or more hosts."""

    name: str  # in --topology, such as v5p:4x4x4
    generation: str
    shape: tuple[int, ...]  # of one slice, in chips
    num_slices: int = 1

    @property
    def chip(self) -> Chip:
        """The row of its chip in the table."""
        return CHIPS[self.generation]

    @property
    def is_tpu(self) -> bool:
        """Whether the devices are TPUs."""
        return self.chip.tpu is not None

    @property
    def platform(self) -> str:
        """The platform of its compiler: "tpu" or "cuda"."""
        return "tpu" if self.is_tpu else "cuda"

    @property
    def chips(self) -> int:
        """The number of chips in all slices."""
        return math.prod(self.shape) * self.num_slices

    @property
    def devices(self) -> int:
        """The number of devices, as jax counts them, in all slices."""
        return self.chips * self.chip.devices_per_chip

    @property
    def hosts(self) -> int:
        """The number of machines of one slice."""
        chips, tpu = math.prod(self.shape), self.chip.tpu
        if tpu and chips <= tpu.largest_machine:
            return 1
        return -(-chips // self.chip.chips_per_host)

    @property
    def topology(self) -> str:
        """The slice's name for the TPU compiler; "" for GPUs."""
        return self.name if self.is_tpu else ""

    @property
    def kwargs(self) -> dict[str, Any]:
        """Further arguments of jax's `get_topology_desc`."""
        tpu = self.chip.tpu
        if tpu is None:
            shape = f"1x{self.hosts}x{self.chips // self.hosts}"  # slices, hosts, GPUs
            return {"topology": shape, "target_config": gpu_targets.text(self.chip)}
        kwargs: dict[str, Any] = {"wrap": self._wrap()}
        if tpu.chip_config:
            kwargs["chip_config_name"] = tpu.chip_config
        if self.num_slices > 1:
            kwargs["num_slices"] = self.num_slices
        return kwargs

    @property
    def link_bytes_per_s(self) -> float:
        """Bytes a second that a device sends over all its links; all dims are rings."""
        links = 2 * len(self.shape) if self.is_tpu else 1
        return links * self.chip.link_bytes_per_s / self.chip.devices_per_chip

    def group_bytes_per_s(self, members: Sequence[int]) -> float:
        """Returns the bytes a second that a device sends in a collective of a group.

        In a ring of the torus, devices send in both directions; a group that spans
        several dims of the torus uses the links of all of them. The GPUs of a host are
        connected by a switch; to other hosts, the group's GPUs of a host share their
        network adapters.

        Args:
          members: positions of the group's devices among all devices.
        """
        chip = self.chip
        if not self.is_tpu:
            hosts = [member // chip.chips_per_host for member in members]
            on_host = hosts.count(hosts[0])
            network = on_host * chip.network_bytes_per_s
            switch = chip.link_bytes_per_s
            return switch if on_host == len(hosts) else min(switch, network)
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
        """Returns whether each dim of the torus is a ring.

        Without these flags the compiler assumes that no dim is a ring.
        """
        if len(self.shape) == 3:
            ring = all(size >= 4 for size in self.shape)
            return ring, ring, ring
        x, y = self.shape
        return x >= 16, y >= 16, False


def parse(text: str, num_slices: int = 1) -> Slice:
    """Returns the slice of a name such as v5p:4x4x4, v6e-256 or h100:8.

    Raises:
      ConfigError: there is no such slice; the error names the nearest one.

    Example:
      >>> parse("v5p:4x4x4").devices, parse("v6e-256").hosts
      (64, 64)
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
    """Returns the generation and the default shape of an accelerator type."""
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
    """Returns the squarest of the shapes with the nearest number of chips."""
    count = math.prod(int(word) for word in size.split("x") if word)

    def distance(shape: str) -> tuple[float, int]:
        dims = clouds.dims(shape)
        return abs(math.log(max(count, 1) / math.prod(dims))), sum(dims)

    return min(tpu.shapes, key=distance)
