"""Mesh settings to a jax Mesh: six named axes over the devices.

Axes are ordered from the least to the most communication, so that `tensor` and
`context` are on neighbouring chips. Every axis exists, with size 1 when unused. An axis
under `mesh.dcn` counts slices (or hosts, where chips have no slices) and is the slower,
outer part of the axis of the same name.
"""

import collections
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from scaletrain.config import AXES, AxesConfig, MeshConfig
from scaletrain.errors import ShardingError

_TYPES = (AxisType.Auto,) * len(AXES)


def _sizes(axes: AxesConfig) -> tuple[int, ...]:
    return tuple(getattr(axes, name) for name in AXES)


def abstract(config: MeshConfig) -> AbstractMesh:
    """Returns the mesh of a resolved `config` without devices, for planning."""
    sizes = tuple(config.size(axis) for axis in AXES)
    return AbstractMesh(sizes, AXES, axis_types=_TYPES)


def build(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns the mesh of a resolved `config` over `devices` (default: all).

    Raises:
      ShardingError: the devices do not form as many slices as `mesh.dcn` asks for.
    """
    devices = jax.devices() if devices is None else devices
    inner, outer = _sizes(config), _sizes(config.dcn)
    slices = [
        mesh_utils.create_device_mesh(inner, slice_, allow_split_physical_axes=True)
        for slice_ in _slices(devices, config.num_slices)
    ]
    # [outer axes, inner axes] -> pairs (outer, inner) of each axis -> their product
    array = np.array(slices).reshape(outer + inner)
    pairs = [axis for i in range(len(AXES)) for axis in (i, i + len(AXES))]
    sizes = tuple(config.size(axis) for axis in AXES)
    return Mesh(array.transpose(pairs).reshape(sizes), AXES, axis_types=_TYPES)


def _slices(devices: Sequence[Any], count: int) -> list[list[Any]]:
    """Returns the devices of each slice; simulated CPU devices are split evenly."""
    if count == 1:
        return [list(devices)]
    groups = collections.defaultdict(list)
    for device in devices:
        slice_index = getattr(device, "slice_index", None)
        groups[device.process_index if slice_index is None else slice_index].append(
            device
        )
    if len(groups) == 1 and devices[0].platform == "cpu":
        return [list(each) for each in np.split(np.array(devices), count)]
    if len(groups) != count:
        raise ShardingError(
            f"mesh.dcn={count}; the devices form {len(groups)} slices or hosts; "
            f"make the axes of mesh.dcn multiply to {len(groups)}."
        )
    return [groups[index] for index in sorted(groups)]
