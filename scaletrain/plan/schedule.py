"""The predicted time of a compiled step: a roofline over its schedule.

The scheduled program is walked in order. An operation takes its time in `costs`; a
synchronous collective takes its time on the wire; an asynchronous transfer, to another
device or to the host's memory, occupies its link from its start instruction, and the
walk waits at its done instruction until it has ended. Nothing is measured: dispatch,
input and checkpoints are left out.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaletrain import hlo
from scaletrain.hardware.slices import Slice
from scaletrain.hlo import (
    COLLECTIVES,
    HOST_SPACE,
    Computation,
    Instruction,
    Module,
    Shape,
)
from scaletrain.plan.costs import Costs

_FREE = (  # opcodes that take no time
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id",
    "after-all", "iota", "broadcast", "async-update", "opt-barrier", "replica-id",
)  # fmt: skip
# The class of the time waited for a link, if the link is not between devices.
_CLASS_OF = {
    "memory": "elementwise",
    "to host": "host_offload",
    "from host": "host_offload",
}
_ENDS = ("async-done", "copy-done", "send-done", "recv-done")


@dataclasses.dataclass(frozen=True)
class Step:
    """The seconds of one step on one device, and its communication."""

    seconds: float
    by_class: dict[str, float]  # seconds; they add up to `seconds`
    communication: dict[str, dict[str, Any]]  # mesh axes -> bytes, seconds, count


@dataclasses.dataclass
class _Clock:
    """The time at the current instruction, and the transfers under way."""

    now: float = 0.0  # seconds since the step began
    by_class: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            ("matmul", "attention", "elementwise", "communication", "host_offload"),
            0.0,
        )
    )
    axes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    links: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )  # the time at which each is free again
    # Asynchronous transfers by their instruction: the time of their end, and the link.
    pending: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def spend(self, name: str, seconds: float) -> None:
        """Advances the clock by an operation of a class."""
        self.now += seconds
        self.by_class[name] += seconds

    def wait(self, until: float, link: str) -> None:
        """Waits for a link; the seconds until then are exposed."""
        late = max(0.0, until - self.now)
        self.spend(_CLASS_OF.get(link, "communication"), late)
        if link in self.axes:
            self.axes[link]["exposed_s"] += late

    def queue(self, name: str, link: str, seconds: float) -> None:
        """Starts an asynchronous transfer as soon as its link is free.

        Args:
          name: of the instruction that starts the transfer.
          link: mesh axes, or a key of `_CLASS_OF`.
          seconds: on the link.
        """
        self.links[link] = max(self.now, self.links[link]) + seconds
        self.pending[name] = self.links[link], link

    def count(self, axis: str, nbytes: float, seconds: float) -> None:
        """Adds a transfer to the communication over mesh axes.

        Args:
          axis: names of the mesh axes, such as data+fsdp.
          nbytes: that a device sends.
          seconds: on the wire.
        """
        sums = self.axes.setdefault(
            axis, {"bytes": 0.0, "wire_s": 0.0, "exposed_s": 0.0, "count": 0}
        )
        sums["bytes"] += nbytes
        sums["wire_s"] += seconds
        sums["count"] += 1


def account(module: Module, axes: dict[str, int], slice_: Slice) -> Step:
    """Returns the predicted time of a program on a device of `slice_`.

    Args:
      module: the scheduled program of one device.
      axes: the mesh axes and their sizes, in the order of the devices.
      slice_: the devices, whose rates the time rests on.
    """
    clock = _Clock()
    _Walk(module, axes, slice_, clock).computation(module.entry)
    return Step(clock.now, clock.by_class, clock.axes)


class _Walk:
    """The walk through a program: its control flow, and transfers beside operations."""

    def __init__(
        self, module: Module, axes: dict[str, int], slice_: Slice, clock: _Clock
    ):
        self._module, self._axes, self._slice = module, axes, slice_
        self._chip, self._clock = slice_.chip, clock
        self._costs = Costs(module, slice_)

    def computation(self, name: str) -> None:
        """Advances the clock by each instruction of a computation, in order."""
        computation = self._module.computations[name]
        for each in computation.instructions:
            self._instruction(each, computation)

    def _instruction(self, each: Instruction, computation: Computation) -> None:
        opcode = each.opcode
        kind = opcode.removesuffix("-start").removesuffix("-done")
        if opcode in ("while", "call", "conditional"):
            self._inside(each)
        elif kind in COLLECTIVES:
            self._collective(each, kind, opcode)
        elif opcode == "async-start" or "async-collective-start" in each.name:
            self._started(each)
        elif opcode in _ENDS or "async-collective-done" in each.name:
            self._done(each)
        elif (each.called("calls") or "").startswith("all-reduce-scatter"):
            self._reduce_scatter(each)
        elif opcode == "copy-start":
            # A prefetch: it occupies the memory, and is waited for if it is late.
            self._clock.queue(
                each.name,
                "memory",
                each.shapes[0].nbytes / self._costs.memory_bytes_per_s,
            )
        elif opcode == "send" and "is_host_transfer=true" in each.attributes:
            self._between_slices(each)
        elif opcode not in _FREE:
            self._clock.spend(*self._costs.of(each, computation))

    def _inside(self, each: Instruction) -> None:
        """Walks through all iterations of a loop, or through the first branch.

        The other branches compute the same with other masks.
        """
        times = self._module.trips(each) if each.opcode == "while" else 1
        for attribute in (
            "body", "to_apply", "true_computation", "branch_computations",
        ):  # fmt: skip
            name = each.called(attribute) or ""
            if name in self._module.computations:
                for _ in range(times):
                    self.computation(name)
                return

    def _collective(self, each: Instruction, kind: str, opcode: str) -> None:
        if opcode.endswith("-done"):
            return self._done(each)
        axis, seconds = self._wire(each, kind)
        if opcode.endswith("-start"):
            self._clock.queue(each.name, axis, seconds)
        else:
            begun = max(self._clock.now, self._clock.links[axis])
            self._clock.wait(begun + seconds, axis)
            self._clock.links[axis] = self._clock.now
        return None

    def _reduce_scatter(self, each: Instruction) -> None:
        """Waits for a reduce-scatter that the compiler wrote as one fusion."""
        for inner in _collectives(self._module, each.called("calls") or ""):
            # It sends half of the bytes of the all-reduce inside the fusion.
            axis, seconds = self._wire(inner, "all-reduce", share=0.5)
            self._clock.wait(self._clock.now + seconds, axis)

    def _wire(
        self, each: Instruction, kind: str, share: float = 1.0
    ) -> tuple[str, float]:
        """Returns the mesh axes of a collective, and its seconds on the wire.

        Args:
          each: the instruction of the collective.
          kind: its opcode, without `-start`.
          share: of the bytes that this kind sends.
        """
        devices = math.prod(self._axes.values())
        members = hlo.group(each, devices)
        axis = self._axis(members)
        share *= (len(members) - 1) / len(members)
        size = sum(shape.nbytes for shape in _results(each))
        # Bytes that a device of a ring sends.
        sent = {
            "all-reduce": 2 * size * share,
            "reduce-scatter": size * (len(members) - 1),
            "collective-permute": size,
        }.get(kind, size * share)
        seconds = sent / self._slice.group_bytes_per_s(members.tolist())
        self._clock.count(axis, sent, seconds)
        return axis, seconds

    def _axis(self, members: np.ndarray) -> str:
        """Returns the names of the mesh axes along which the members differ."""
        sizes = tuple(self._axes.values())
        indices = np.array(np.unravel_index(members % math.prod(sizes), sizes))
        names = [
            name
            for name, row in zip(self._axes, indices, strict=True)
            if len(set(row.tolist())) > 1
        ]
        return "+".join(names) or "none"

    def _between_slices(self, each: Instruction) -> None:
        size = each.shapes[0].nbytes
        seconds = size * self._chip.devices_per_chip / self._chip.network_bytes_per_s
        self._clock.count("dcn", size, seconds)
        self._clock.queue(each.name, "dcn", seconds)

    def _started(self, each: Instruction) -> None:
        """Starts the transfers of an asynchronous computation, if it has any."""
        name = each.called("calls") or ""
        inner = self._module.computations.get(name)
        if inner is not None and (transfer := _host_transfer(inner)):
            link, size = transfer
            seconds = size * self._chip.devices_per_chip / self._chip.host_bytes_per_s
            self._clock.queue(each.name, link, seconds)
        for collective in _collectives(self._module, name) if name else ():
            kind = collective.opcode.removesuffix("-start")
            axis, seconds = self._wire(collective, kind)
            self._clock.queue(each.name, axis, seconds)

    def _done(self, each: Instruction) -> None:
        """Waits for the transfer whose start is an operand or has the same number."""
        for operand in (*each.operands, each.name.replace("-done", "-start")):
            if transfer := self._clock.pending.pop(operand.split("#")[0], None):
                self._clock.wait(*transfer)


def _host_transfer(inner: Computation) -> tuple[str, int] | None:
    """Returns the link and the bytes of a transfer to or from the host's memory."""
    for each in inner.instructions:
        source = inner.shape(each.operands[0]) if each.operands else None
        if source is None or source.space != HOST_SPACE:
            continue
        if each.opcode == "dynamic-slice":
            return "from host", each.nbytes
        update = inner.shape(each.operands[1]) if len(each.operands) > 1 else None
        if each.opcode == "dynamic-update-slice" and update is not None:
            return "to host", update.nbytes
    return None


def _collectives(module: Module, name: str) -> list[Instruction]:
    """Returns the collectives in a computation and in those that it calls."""
    collectives = []
    for each in module.computations[name].instructions:
        if each.opcode.removesuffix("-start") in COLLECTIVES:
            collectives.append(each)
        for attribute in ("calls", "called_computations"):
            if (inner := each.called(attribute)) in module.computations:
                collectives += _collectives(module, inner)
    return collectives


def _results(each: Instruction) -> Sequence[Shape]:
    """Returns the shapes of the results of a collective, one for each operand.

    A start may list its operands before its results, and its own buffers after them.
    """
    count = len(each.operands)
    begins = each.opcode.endswith("-start") and len(each.shapes) >= 2 * count
    return each.shapes[count : 2 * count] if begins else each.shapes[:count]
