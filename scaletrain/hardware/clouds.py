"""Names of TPU slices on Google Cloud: accelerator types, such as v5p-128."""

import math
from collections.abc import Sequence

from scaletrain.hardware.chip import Chip, Tpu
from scaletrain.hardware.tpus import TPUS

BY_NAME: dict[str, Chip] = {chip.tpu.cloud.name: chip for chip in TPUS if chip.tpu}


def accelerator_type(tpu: Tpu, shape: Sequence[int]) -> str:
    """Returns the name for slices of this size; it stands for their default shape."""
    return f"{tpu.cloud.name}-{_size(tpu, shape)}"


def default_shape(tpu: Tpu, shape: Sequence[int]) -> str:
    """Returns the default shape of the slices that are as large as `shape`."""
    return default_shapes(tpu)[_size(tpu, shape)]


def default_shapes(tpu: Tpu) -> dict[int, str]:
    """Returns the default shape of each size in an accelerator type: the squarest."""
    # Of the shapes of one size the last one stays in the dict.
    squarest_last = sorted(tpu.shapes, key=lambda shape: -sum(dims(shape)))
    return {_size(tpu, dims(shape)): shape for shape in squarest_last}


def on_vms(tpu: Tpu, shape: Sequence[int]) -> bool:
    """Returns whether Cloud TPU VMs offer the slice; GKE offers every slice."""
    return bool(tpu.cloud.runtime) and dims(default_shape(tpu, shape)) == tuple(shape)


def dims(shape: str) -> tuple[int, ...]:
    """Returns the dims of a shape such as 4x4x4, in chips."""
    return tuple(map(int, shape.split("x")))


def _size(tpu: Tpu, shape: Sequence[int]) -> int:
    return tpu.cloud.cores * math.prod(shape)
