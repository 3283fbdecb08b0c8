"""How long a compiled step takes: a roofline over the schedule, wire and arithmetic.

The scheduled program is walked in order. An operation takes its time in `costs`; a
synchronous collective takes its time on the wire; an asynchronous one occupies its
links from its start, and if it is not over at its end the walk waits for it, be it a
transfer to another device or to the host's memory. Nothing is measured: dispatch, input
and checkpoints are left out.
"""

import collections
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from scaletrain import hlo
from scaletrain.hardware.slices import Slice
from scaletrain.hlo import COLLECTIVES, Computation, Instruction, Module, Shape
from scaletrain.plan.costs import Costs

_FREE = (
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id",
    "after-all", "iota", "broadcast", "async-update", "opt-barrier", "replica-id",
)  # fmt: skip


_HOST = 5  # the memory space of what is moved to the host
# What lateness of a link counts as, if it is not between devices.
_CLASS_OF = {
    "memory": "elementwise",
    "to host": "host_offload",
    "from host": "host_offload",
}
_ENDS = ("async-done", "copy-done", "send-done", "recv-done")


@dataclasses.dataclass(frozen=True)
class Step:
    """Seconds of one step on one device, and what it sends."""

    seconds: float
    by_class: dict[str, float]  # seconds; they add up to `seconds`
    communication: dict[str, dict[str, Any]]  # mesh axes -> bytes, seconds, count


@dataclasses.dataclass
class _Clock:
    """Where the walk is, and what it has met."""

    now: float = 0.0
    by_class: dict[str, float] = dataclasses.field(
        default_factory=lambda: dict.fromkeys(
            ("matmul", "attention", "elementwise", "communication", "host_offload"),
            0.0,
        )
    )
    axes: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    links: dict[str, float] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(float)
    )  # when each is free again
    pending: dict[str, tuple[float, str]] = dataclasses.field(default_factory=dict)

    def spend(self, what: str, seconds: float) -> None:
        self.now += seconds
        self.by_class[what] += seconds

    def wait(self, until: float, axis: str) -> None:
        late = max(0.0, until - self.now)
        self.spend(_CLASS_OF.get(axis, "communication"), late)
        if axis in self.axes:
            self.axes[axis]["exposed_s"] += late


def account(module: Module, axes: dict[str, int], slice_: Slice) -> Step:
    """Returns the account of a program on a device of `slice_`.

    Args:
      axes: the mesh axes and their sizes, in the order of the devices.
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
        """Takes every instruction of a computation in turn."""
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
            self._queue(
                each.name,
                "memory",
                each.shapes[0].nbytes / self._costs.memory_bytes_per_s,
            )
        elif opcode == "send" and "is_host_transfer=true" in each.attributes:
            self._between_slices(each)
        elif opcode not in _FREE:
            self._clock.spend(*self._costs.of(each, computation))

    def _inside(self, each: Instruction) -> None:
        """Takes a loop as often as it runs; of branches the first.

        Branches compute the same with other masks.
        """
        times = self._module.trips(each) if each.opcode == "while" else 1
        for what in ("body", "to_apply", "true_computation", "branch_computations"):
            name = each.called(what) or ""
            if name in self._module.computations:
                for _ in range(times):
                    self.computation(name)
                return

    def _collective(self, each: Instruction, kind: str, opcode: str) -> None:
        if opcode.endswith("-done"):
            return self._done(each)
        axis, seconds = self._wire(each, kind)
        if opcode.endswith("-start"):
            self._queue(each.name, axis, seconds)
        else:
            begun = max(self._clock.now, self._clock.links[axis])
            self._clock.wait(begun + seconds, axis)
            self._clock.links[axis] = self._clock.now
        return None

    def _reduce_scatter(self, each: Instruction) -> None:
        """Takes a sum of which each device keeps a part, written as one operation."""
        for inner in self._transfers(each.called("calls") or ""):
            axis, seconds = self._wire(inner, "all-reduce", share=0.5)
            self._clock.wait(self._clock.now + seconds, axis)

    def _wire(
        self, each: Instruction, kind: str, share: float = 1.0
    ) -> tuple[str, float]:
        """Returns the axes a collective runs over and its seconds on the wire."""
        devices = math.prod(self._axes.values())
        members = hlo.group(each, devices)
        axis = self._axis(members)
        share *= (len(members) - 1) / len(members)
        size = sum(shape.nbytes for shape in _results(each))
        sent = {
            "all-reduce": 2 * size * share,
            "reduce-scatter": size * (len(members) - 1),
            "collective-permute": size,
        }.get(kind, size * share)
        seconds = sent / self._slice.group_bytes_per_s(members.tolist())
        sums = self._clock.axes.setdefault(
            axis, {"bytes": 0.0, "wire_s": 0.0, "exposed_s": 0.0, "count": 0}
        )
        sums["bytes"] += sent
        sums["wire_s"] += seconds
        sums["count"] += 1
        return axis, seconds

    def _axis(self, members: np.ndarray) -> str:
        """Returns the names of the mesh axes along which the members differ."""
        sizes = tuple(self._axes.values())
        places = np.array(np.unravel_index(members % math.prod(sizes), sizes))
        names = [
            name
            for name, row in zip(self._axes, places, strict=True)
            if len(set(row.tolist())) > 1
        ]
        return "+".join(names) or "none"

    def _between_slices(self, each: Instruction) -> None:
        size = each.shapes[0].nbytes
        sums = self._clock.axes.setdefault(
            "dcn", {"bytes": 0.0, "wire_s": 0.0, "exposed_s": 0.0, "count": 0}
        )
        seconds = size * self._chip.devices_per_chip / self._chip.network_bytes_per_s
        sums["bytes"] += size
        sums["wire_s"] += seconds
        sums["count"] += 1
        self._queue(each.name, "dcn", seconds)

    def _queue(self, name: str, link: str, seconds: float) -> None:
        """Starts a transfer when its link is free."""
        links = self._clock.links
        links[link] = max(self._clock.now, links[link]) + seconds
        self._clock.pending[name] = links[link], link

    def _started(self, each: Instruction) -> None:
        """Starts what an asynchronous computation transfers, if it does."""
        name = each.called("calls")
        found = self._transfers(name) if name else []
        if name in self._module.computations and (way := self._host_way(name)):
            link, size = way
            seconds = size * self._chip.devices_per_chip / self._chip.host_bytes_per_s
            self._queue(each.name, link, seconds)
        for instruction in found:
            kind = instruction.opcode.removesuffix("-start")
            axis, seconds = self._wire(instruction, kind)
            self._queue(each.name, axis, seconds)

    def _host_way(self, name: str) -> tuple[str, int] | None:
        """Returns to or from which memory a computation moves how many bytes."""
        inner = self._module.computations[name]
        for each in inner.instructions:
            source = inner.shape(each.operands[0]) if each.operands else None
            if source is None or source.space != _HOST:
                continue
            if each.opcode == "dynamic-slice":
                return "from host", each.nbytes
            update = inner.shape(each.operands[1]) if len(each.operands) > 1 else None
            if each.opcode == "dynamic-update-slice" and update is not None:
                return "to host", update.nbytes
        return None

    def _transfers(self, name: str) -> list[Instruction]:
        found = []
        for each in self._module.computations[name].instructions:
            if each.opcode.removesuffix("-start") in COLLECTIVES:
                found.append(each)
            for what in ("calls", "called_computations"):
                if (inner := each.called(what)) in self._module.computations:
                    found += self._transfers(inner)
        return found

    def _done(self, each: Instruction) -> None:
        """Waits for what was started: by its operand, or by its name's other half."""
        for operand in (*each.operands, each.name.replace("-done", "-start")):
            if found := self._clock.pending.pop(operand.split("#")[0], None):
                self._clock.wait(*found)


def _results(each: Instruction) -> Sequence[Shape]:
    """Returns the results of a collective, one for each operand.

    A start may give its operands before them, and what it needs itself after them.
    """
    count = len(each.operands)
    begins = each.opcode.endswith("-start") and len(each.shapes) >= 2 * count
    return each.shapes[count : 2 * count] if begins else each.shapes[:count]
