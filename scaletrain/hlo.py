"""The compiler's optimised program as data: computations of instructions, in order.

The text is no stable interface. An instruction that this parser does not understand
keeps its opcode, so that a new compiler makes an account incomplete and not wrong.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_BYTES = {  # of one element, by format
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1,
    "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4,
    "f64": 8, "s64": 8, "u64": 8,
}  # fmt: skip
_SHAPE = re.compile(r"([a-z][a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_END = re.compile(r"^\}($|, )")  # the thread it runs on may follow
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_CONTRACTED = re.compile(r"lhs_contracting_dim(?:s=|ensions\":)[{\[]([^}\]]*)")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|branch_computations|"
    r"called_computations)=\{?%?([\w.\-]+)"
)
COLLECTIVES = (
    "all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute",
    "ragged-all-to-all", "collective-broadcast",
)  # fmt: skip
HOST_SPACE = 5  # the memory space of values in the host's memory


@dataclasses.dataclass(frozen=True)
class Shape:
    """One array: its format, its dims and its memory space."""

    kind: str  # format of the elements, such as bf16
    dims: tuple[int, ...]
    space: int = 0  # 0 = HBM, see HOST_SPACE

    @property
    def nbytes(self) -> int:
        """Bytes of the array, without the padding of tiles."""
        return int(math.prod(self.dims) * _BYTES.get(self.kind, 0))

    def __str__(self) -> str:
        return f"{self.kind}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation of a program."""

    name: str
    shapes: tuple[Shape, ...]  # of its results
    opcode: str
    operands: tuple[str, ...]  # names; `name#part` for one result of several
    attributes: str  # the rest of its line
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path in the Python program from which the operation stems."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @property
    def nbytes(self) -> int:
        """Bytes of the results."""
        return sum(shape.nbytes for shape in self.shapes)

    def called(self, attribute: str) -> str | None:
        """Returns the name of the computation in an attribute such as `body`."""
        return self._called.get(attribute)

    @functools.cached_property
    def _called(self) -> dict[str, str]:
        pairs = _CALLED.findall(self.attributes)
        return dict(reversed(pairs))  # the first of a name counts


@dataclasses.dataclass(frozen=True)
class Computation:
    """Instructions in the order in which they run."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by their names."""
        return {each.name: each for each in self.instructions}

    @property
    def root(self) -> Instruction:
        """The instruction whose result the computation returns."""
        return next(each for each in self.instructions if each.is_root)

    def shape(self, operand: str) -> Shape | None:
        """Returns the shape of an operand, `name` or `name#part`; None if unknown."""
        name, _, part = operand.partition("#")
        instruction = self.by_name.get(name)
        index = int(part) if part.isdigit() else 0
        if instruction is None or index >= len(instruction.shapes):
            return None
        return instruction.shapes[index]

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that read each instruction, by its name."""
        readers: dict[str, list[Instruction]] = {}
        for each in self.instructions:
            for operand in each.operands:
                readers.setdefault(operand.split("#")[0], []).append(each)
        return readers


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: its computations by their names."""

    computations: dict[str, Computation]
    entry: str  # name of the computation that runs first

    def trips(self, loop: Instruction) -> int:
        """Returns the number of iterations of a while loop.

        It is the compiler's own count or, without one, the constant with which the
        loop's condition compares its counter.
        """
        if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
            return int(known[1])
        condition = self.computations[loop.called("condition") or ""]
        constants = [
            int(each.operands[0])
            for each in condition.instructions
            if each.opcode == "constant" and re.fullmatch(r"\d+", each.operands[0])
        ]
        return max(constants, default=1)


def parse(text: str) -> Module:
    """Returns the program of an optimised, scheduled HLO dump."""
    computations, entry = {}, ""
    for name, is_entry, lines in _blocks(text):
        instructions = tuple(each for line in lines if (each := _instruction(line)))
        computations[name] = Computation(name, instructions)
        entry = name if is_entry else entry
    return Module(computations, entry)


def _blocks(text: str) -> Iterator[tuple[str, bool, list[str]]]:
    """Yields (name, is entry, lines) of each computation; an instruction is a line."""
    name, is_entry, lines = "", False, []
    for line in text.splitlines():
        if not name:
            if head := _HEAD.match(line):
                is_entry, name, lines = bool(head[1]), head[2], []
        elif _END.match(line):
            yield name, is_entry, lines
            name = ""
        elif _LINE.match(line):
            lines.append(line)
        elif lines:  # an attribute may run over several lines
            lines[-1] += " " + line.strip()


def _instruction(line: str) -> Instruction | None:
    head = _LINE.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    close = _closing("(" + rest, 0) - 1
    operands = tuple(
        word.split()[-1].lstrip("%") for word in _split(rest[:close]) if word.strip()
    )
    return Instruction(
        head[2], shapes, opcode, operands, rest[close + 1 :], bool(head[1])
    )


def _closing(text: str, start: int) -> int:
    """Returns the index of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
            if depth == 0:
                return i
    return len(text) - 1


def _split(text: str) -> list[str]:
    """Returns the parts of a text between the commas outside all brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [*parts, text[start:]]


def _shapes(text: str) -> tuple[Shape, ...]:
    shapes = []
    for kind, dims, layout in _SHAPE.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(size) for size in dims.split(",") if size)
        shapes.append(Shape(kind, sizes, int(space[1]) if space else 0))
    return tuple(shapes)


def group(instruction: Instruction, devices: int) -> np.ndarray:
    """Returns the devices of the first group of a collective, as positions.

    The first is taken to stand for all: they have one size and run over the same mesh
    axes.
    """
    text = instruction.attributes
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", text):
        sizes = {
            name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])
        }
        over = re.findall(r"'([^']+)'", match[2])
        ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        index = tuple(slice(None) if name in over else 0 for name in sizes)
        return ids[index].reshape(-1)
    if match := re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text
    ):
        groups, dims = (tuple(map(int, match[i].split(","))) for i in (1, 2))
        ids = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            ids = ids.transpose(tuple(map(int, match[3].split(","))))
        return ids.reshape(groups)[0].reshape(-1)
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array(list(map(int, match[1].split(","))))
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return np.array([int(match[1]), int(match[2])])
    return np.arange(devices)


_OWN_KERNEL = 'custom_call_target="mosaic_gpu'  # of kernels.matmul


def flops(instruction: Instruction, computation: Computation) -> int:
    """Returns the useful FLOPs of a convolution or a dot, padding left out.

    Raises:
      ValueError: the shape of an operand is unknown.
    """
    attributes = instruction.attributes
    cublas = "__cublas" in attributes  # a dot, as a call of a GPU's library
    own = _OWN_KERNEL in attributes and "/matmul/" in instruction.op_name
    if instruction.opcode not in ("convolution", "dot") and not cublas and not own:
        return 0
    lhs, rhs = map(computation.shape, instruction.operands[:2])
    if lhs is None or rhs is None:
        raise ValueError(f"{instruction.name} multiplies what is not there")
    if own:
        return 2 * math.prod(lhs.dims) * math.prod(rhs.dims) // lhs.dims[1]
    out = instruction.shapes[0]
    if instruction.opcode == "dot" or cublas:
        dims = _CONTRACTED.search(attributes)
        over = map(int, re.findall(r"\d+", dims[1]) if dims else ())
        return 2 * math.prod(out.dims) * math.prod(lhs.dims[i] for i in over)
    return _convolution(attributes, lhs, rhs, out)


def _convolution(attributes: str, lhs: Shape, rhs: Shape, out: Shape) -> int:
    """Returns the FLOPs of a convolution without those of its padding.

    They are 2 x batch x features in x features out x pairs of positions.
    """
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", attributes)
    assert labels is not None
    window = _window(attributes)
    pairs = 1
    for dim in sorted(x for x in labels[2] if x.isdigit()):
        i = int(dim)
        pairs *= _meetings(
            lhs.dims[labels[1].index(dim)],
            rhs.dims[labels[2].index(dim)],
            out.dims[labels[3].index(dim)],
            *(
                window[name][i]
                for name in ("stride", "pad", "lhs_dilate", "rhs_dilate")
            ),
        )
    batch = out.dims[labels[3].index("b")]
    outputs = out.dims[labels[3].index("f")]
    inputs = rhs.dims[labels[2].index("i")]
    return 2 * batch * outputs * inputs * pairs


def _window(attributes: str) -> dict[str, list[int]]:
    """Returns stride, low padding and dilations of each spatial dim."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    words = dict(word.split("=") for word in match[1].split()) if match else {}
    count = len(words["size"].split("x")) if "size" in words else 0

    def numbers(name: str, default: str) -> list[int]:
        text = words.get(name, "x".join([default] * count))
        return [int(part.split("_")[0]) for part in text.split("x") if part]

    return {
        "stride": numbers("stride", "1"),
        "pad": numbers("pad", "0_0"),
        "lhs_dilate": numbers("lhs_dilate", "1"),
        "rhs_dilate": numbers("rhs_dilate", "1"),
    }


def _meetings(
    size: int, kernel: int, out: int, stride: int, pad: int, spread: int, gap: int
) -> int:
    """Returns the number of (output, kernel) positions that read an input element.

    The others read padding, or a gap between two elements of a dilated input.

    Args:
      size, kernel, out: positions of the input, the kernel and the output.
      spread, gap: dilation of the input and of the kernel.
    """
    read = np.arange(out)[:, None] * stride + np.arange(kernel)[None] * gap - pad
    inside = (read >= 0) & (read <= (size - 1) * spread)
    return int((inside & (read % spread == 0)).sum())
