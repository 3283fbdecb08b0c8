"""Devices in their places."""

import dataclasses

import jax
import numpy as np
import pytest

from scaletrain import mesh
from scaletrain.config import AXES, AxesConfig, MeshConfig
from scaletrain.errors import ShardingError


def test_every_axis_exists_and_is_auto():
    grid = mesh.build(MeshConfig(data=2, tensor=4))
    assert dict(grid.shape) == dict.fromkeys(AXES, 1) | {"data": 2, "tensor": 4}
    assert set(grid.axis_types) == {jax.sharding.AxisType.Auto}
    assert mesh.abstract(MeshConfig(data=2, tensor=4)).shape == grid.shape


def test_dcn_is_the_outer_part_of_an_axis():
    config = MeshConfig(data=2, tensor=2, dcn=AxesConfig(data=2))
    ids = np.vectorize(lambda d: d.id)(mesh.build(config).devices)
    # data: slice 0 first, then slice 1; devices of a slice stay together
    assert sorted(ids[0, :2].ravel()) == [0, 1, 2, 3]
    assert sorted(ids[0, 2:].ravel()) == [4, 5, 6, 7]
    assert mesh.abstract(config).shape["data"] == 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """Stands for a device of a slice."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "gpu"
    device_kind: str = "fake"


def test_slices_are_told_by_their_index():
    chips = [Chip(i, slice_index=i % 2) for i in range(8)]
    config = MeshConfig(fsdp=4, dcn=AxesConfig(data=2))
    grid = mesh.build(config, chips)
    rows = grid.devices.reshape(2, 4)
    assert [{c.slice_index for c in row} for row in rows] == [{0}, {1}]
    with pytest.raises(ShardingError, match="mesh.dcn=4; the devices form 2 slices"):
        mesh.build(MeshConfig(fsdp=2, dcn=AxesConfig(data=4)), chips)
