"""What the compiler lays into a device's memory: how much, and what the largest are."""

import dataclasses
import re

from scaletrain.plan.hlo import Module

_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?(?: \(phi\))? @0> "
    r"\(size=(\d+),offset=(\d+)\): (\S+)"
)
_THREAD_LOCAL = re.compile(
    r"^allocation \d+: size (\d+),(?!.*color).* thread-local", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """The memory of one device."""

    total_bytes: int  # what the limit is applied to
    host_bytes: int  # moved to the host's memory
    largest: list[tuple[int, str]]  # (bytes, shape and origin), of what is temporary


def usage(report: str, assignment: str, module: Module) -> Usage:
    """Returns what the dumped report and buffer assignment of a step say."""
    totals = {
        int(color): int(size)
        for color, size in re.findall(
            r"Memory Space: \S+ \(color=(\d+)\)\nTotal bytes: (\d+)", report
        )
    }
    # Asynchronous computations name their operands once more; they take no room.
    names = sum(map(int, _THREAD_LOCAL.findall(assignment)))
    total = totals.get(0, 0) - names
    return Usage(total, totals.get(5, 0), _largest(assignment, module))


def _largest(assignment: str, module: Module) -> list[tuple[int, str]]:
    """Returns the largest temporary values, one for each place in memory."""
    names = {
        each.name: each.op_name
        for computation in module.computations.values()
        for each in computation.instructions
    }
    found: dict[int, tuple[int, str]] = {}
    temporary = False
    for line in assignment.splitlines():
        if line.startswith("allocation"):
            temporary = "preallocated-temp" in line and "color" not in line
        elif temporary and (value := _VALUE.match(line)):
            name, size, offset, shape = value.groups()
            where = names.get(name, "").removeprefix("jit(train_step)/") or name
            size = int(size)
            if size > found.get(int(offset), (0, ""))[0]:
                found[int(offset)] = size, f"{shape.split('{')[0]} {where}"
    return sorted(found.values(), reverse=True)


def by_class(total_bytes: int, known: dict[str, int]) -> dict[str, int]:
    """Returns `known` bytes by class and the rest of the total as activations.

    What is known is worked out from the step's own shapes; gradients are of the shape
    of what is trained, and share their memory with activations where they can.
    """
    left = total_bytes
    found = {}
    for name, size in known.items():
        found[name] = min(size, left)
        left -= found[name]
    return found | {"activations_and_temporaries": left}
