"""The memory of a device, by the compiler's buffer assignment."""

import dataclasses
import re

from scaletrain.hlo import HOST_SPACE, Module

_VALUE = re.compile(
    r"^ value: <\d+ ([\w.\-]+)(?:\{[\d,]*\})?(?: \(phi\))? @0> "
    r"\(size=(\d+),offset=(\d+)\): (\S+)"
)
# Parts of a value's origin that come from jax's transforms, not from the model.
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

    total_bytes: int  # in HBM; they have to be within the device's limit
    temporary_bytes: int  # part of `total_bytes`: free between two steps
    host_bytes: int  # offloaded to the host's memory
    largest: list[tuple[int, str]]  # (bytes, shape and origin) of temporary values


def origin(name: str) -> str:
    """Returns the parts of an operation's name that stem from the model."""
    return _PLUMBING.sub("", name).replace("\\'", "'")


def usage(
    report: str, assignment: str, module: Module, shapes: dict[str, str]
) -> Usage:
    """Returns the memory usage in the compiler's dump of a step.

    Args:
      report: text of the memory usage report.
      assignment: text of the buffer assignment.
      module: the optimised program, which has the origins of the values.
      shapes: names of the weights by shape, for a value whose origin is unknown.
    """
    totals = {
        int(color): int(size)
        for color, size in re.findall(
            r"Memory Space: \S+ \(color=(\d+)\)\nTotal bytes: (\d+)", report
        )
    }
    # Asynchronous computations list their operands a second time, without memory of
    # their own.
    aliases = sum(map(int, _THREAD_LOCAL.findall(assignment)))
    return Usage(
        total_bytes=totals.get(0, 0) - aliases,
        temporary_bytes=sum(map(int, _TEMPORARY.findall(assignment))),
        host_bytes=totals.get(HOST_SPACE, 0),
        largest=_largest(assignment, module, shapes),
    )


def _largest(
    assignment: str, module: Module, shapes: dict[str, str]
) -> list[tuple[int, str]]:
    """Returns the temporary values, the largest of each offset, the largest first."""
    names = {
        each.name: each.op_name
        for computation in module.computations.values()
        for each in computation.instructions
    }
    largest: dict[int, tuple[int, str]] = {}  # by the offset in memory
    temporary = False
    for line in assignment.splitlines():
        if line.startswith("allocation"):
            temporary = "preallocated-temp" in line and "color" not in line
        elif temporary and (value := _VALUE.match(line)):
            name, size, offset, shape = value.groups()
            source = origin(names.get(name, "")) or name
            size = int(size)
            shape = shape.split("{")[0]
            dims = shape.partition("[")[2].rstrip("]")
            if "/" not in source and dims in shapes:
                source = f"{source}, of the shape of {shapes[dims]}"
            if size > largest.get(int(offset), (0, ""))[0]:
                largest[int(offset)] = size, f"{shape} {source}"
    return sorted(largest.values(), reverse=True)


def by_class(usage: Usage, known: dict[str, int]) -> dict[str, int]:
    """Returns the bytes of the total by class.

    Gradients are temporary values, of as many bytes as the trained parameters, and
    share memory with activations where the compiler can. The rest beside state and
    temporaries is the batch, counters, constants and the padding of tiles.

    Args:
      usage: the memory of one device.
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
