"""The settings of the device mesh."""

import dataclasses
import math

from scaletrain.config.setting import free

# The axes in the order of the devices, from the least to the most communication.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp")  # those that split the rows of a batch


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxesConfig:
    """Sizes of the six mesh axes; 1 = unused, -1 = the devices that are left."""

    data: int = free(
        1,
        "Copies of the parameters, among which the batch is split; 1 = unused, -1 = "
        "what is left.",
        least=-1,
    )
    fsdp: int = free(
        1,
        "Shards of the parameters and of the batch; 1 = unused, -1 = what is left.",
        least=-1,
    )
    expert: int = free(
        1, "Shards of the experts; 1, since the model has none.", least=-1
    )
    context: int = free(
        1, "Shards of each sequence; 1 = unused, -1 = what is left.", least=-1
    )
    tensor: int = free(
        1,
        "Shards of heads, hidden units and vocabulary; 1 = unused, -1 = what is left.",
        least=-1,
    )
    stage: int = free(
        1,
        "Shards of the stack of layers; 1, since layers cannot be split over stages.",
        least=-1,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(AxesConfig):
    """Axes inside a slice, and under `dcn` the same axes across slices or hosts."""

    dcn: AxesConfig = AxesConfig()

    def size(self, axis: str) -> int:
        """Returns the size of an axis inside slices times that across them."""
        return getattr(self, axis) * getattr(self.dcn, axis)

    @property
    def num_slices(self) -> int:
        """The slices, or hosts, that the axes of `dcn` multiply to."""
        return math.prod(getattr(self.dcn, axis) for axis in AXES)

    @property
    def num_devices(self) -> int | None:
        """The devices that the axes multiply to; None while one is -1."""
        if -1 in (getattr(part, axis) for part in (self, self.dcn) for axis in AXES):
            return None
        return math.prod(self.size(axis) for axis in AXES)
