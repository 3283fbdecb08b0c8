"""Names of TPU slices on Google Cloud: accelerator types, such as v5p-128."""

import math
from collections.abc import Sequence

from scaletrain.hardware.chip import Chip, Tpu
from scaletrain.hardware.tpus import TPUS

BY_NAME: dict[str, Chip] = {chip.tpu.cloud.name: chip for chip in TPUS if chip.tpu}


def accelerator_type(tpu: Tpu, shape: Sequence[int]) -> str:
    """Returns the name of a slice; it stands for the default shape of this size."""
    return f"{tpu.cloud.name}-{_size(tpu, shape)}"


def default_shape(tpu: Tpu, shape: Sequence[int]) -> str:
    """Returns the shape that Google Cloud takes for the accelerator type of another."""
    return default_shapes(tpu)[_size(tpu, shape)]


def default_shapes(tpu: Tpu) -> dict[int, str]:
    """Returns the shape behind each size in an accelerator type: the squarest."""
    squarest_last = sorted(tpu.shapes, key=lambda shape: -sum(dims(shape)))
    return {_size(tpu, dims(shape)): shape for shape in squarest_last}


def on_vms(tpu: Tpu, shape: Sequence[int]) -> bool:
    """Whether Cloud TPU VMs offer the slice; GKE has every slice."""
    return bool(tpu.cloud.runtime) and dims(default_shape(tpu, shape)) == tuple(shape)


def dims(shape: str) -> tuple[int, ...]:
    """Returns the dims of a shape such as 4x4x4."""
    return tuple(map(int, shape.split("x")))


def _size(tpu: Tpu, shape: Sequence[int]) -> int:
    return tpu.cloud.cores * math.prod(shape)
