"""What the compiler lays into a device's memory: how much, and what the largest are."""

import dataclasses
import re

from scaletrain.hlo import Module

_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?(?: \(phi\))? @0> "
    r"\(size=(\d+),offset=(\d+)\): (\S+)"
)
# Parts of a value's origin that say nothing of the model.
_PLUMBING = re.compile(
    r"(?:while|body|eval_jaxpr|checkpoint|shard_map|closed_call|vmap\([^)]*\)|"
    r"jvp\(\)|(?:(?:transpose|jvp|vmap)\()*jit\([^)]*\)+)/"
)
_TEMPORARY = re.compile(
    r"^allocation \d+: size (\d+),(?!.*color).* preallocated-temp", re.MULTILINE
)
_THREAD_LOCAL = re.compile(
    r"^allocation \d+: size (\d+),(?!.*color).* thread-local", re.MULTILINE
)


@dataclasses.dataclass(frozen=True)
class Usage:
    """The memory of one device."""

    total_bytes: int  # what the limit is applied to
    temporary_bytes: int  # of it, given back between two steps
    host_bytes: int  # moved to the host's memory
    largest: list[tuple[int, str]]  # (bytes, shape and origin), of what is temporary


def origin(name: str) -> str:
    """Returns what an operation's name says of the model."""
    return _PLUMBING.sub("", name).replace("\\'", "'")


def usage(
    report: str, assignment: str, module: Module, shapes: dict[str, str]
) -> Usage:
    """Returns what the dumped report and buffer assignment of a step say.

    Args:
      shapes: the weights of a shape, for a value whose origin is not known.
    """
    totals = {
        int(color): int(size)
        for color, size in re.findall(
            r"Memory Space: \S+ \(color=(\d+)\)\nTotal bytes: (\d+)", report
        )
    }
    # Asynchronous computations name their operands once more; they take no room.
    names = sum(map(int, _THREAD_LOCAL.findall(assignment)))
    return Usage(
        total_bytes=totals.get(0, 0) - names,
        temporary_bytes=sum(map(int, _TEMPORARY.findall(assignment))),
        host_bytes=totals.get(5, 0),
        largest=_largest(assignment, module, shapes),
    )


def _largest(
    assignment: str, module: Module, shapes: dict[str, str]
) -> list[tuple[int, str]]:
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
            where = origin(names.get(name, "")) or name
            size = int(size)
            shape = shape.split("{")[0]
            dims = shape.partition("[")[2].rstrip("]")
            if "/" not in where and dims in shapes:
                where = f"{where}, of the shape of {shapes[dims]}"
            if size > found.get(int(offset), (0, ""))[0]:
                found[int(offset)] = size, f"{shape} {where}"
    return sorted(found.values(), reverse=True)


def by_class(usage: Usage, known: dict[str, int]) -> dict[str, int]:
    """Returns the bytes of the total by class.

    Gradients lie among what is temporary, as many bytes as what is trained, and share
    them with activations where they can. Beside state and temporaries there are the
    batch, counters, constants and what a device's tiles add.

    Args:
      known: bytes of parameters, optimizer and gradients, from the step's own shapes.
    """
    gradients = min(known["gradients"], usage.temporary_bytes)
    state = known["parameters"] + known["optimizer"]
    return {
        "parameters": known["parameters"],
        "optimizer": known["optimizer"],
        "gradients": gradients,
        "activations_and_temporaries": usage.temporary_bytes - gradients,
        "other": usage.total_bytes - usage.temporary_bytes - state,
    }
