"""The cost of one operation of a compiled program: FLOPs, traffic, seconds.

An operation takes the larger of its arithmetic and its memory traffic, attention on
GPUs their sum.
"""

import math
import re
from collections.abc import Sequence

from scaletrain import hlo
from scaletrain.hardware.slices import Slice
from scaletrain.hlo import Computation, Instruction, Module, Shape

# The attributes of a fusion that only changes the tiles of its operand.
_RETILED = "output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion"
_LOW_PRECISION = {"f8": "fp8", "s8": "int8"}  # by the beginning of a format
_CUDNN = "__cudnn$fmha"
_BLOCK = re.compile(r'\\"block_kv\w*\\": (\d+)')  # in splash attention's metadata


class Costs:
    """The costs of a program's operations on a device of a slice."""

    def __init__(self, module: Module, slice_: Slice):
        self._module, self._slice, self._chip = module, slice_, slice_.chip
        # By the id of the instruction: each iteration of a loop asks again.
        self._known: dict[int, tuple[str, float]] = {}

    def of(self, each: Instruction, computation: Computation) -> tuple[str, float]:
        """Returns the class of an operation ("matmul", ...) and its seconds."""
        if id(each) not in self._known:
            self._known[id(each)] = self._cost(each, computation)
        return self._known[id(each)]

    @property
    def memory_bytes_per_s(self) -> float:
        """Bytes a second that an operation reads and writes in a device's memory."""
        return self._chip.memory_efficiency * self._chip.hbm_bytes_per_s

    def _cost(self, each: Instruction, computation: Computation) -> tuple[str, float]:
        """Returns the class of an operation, and its seconds."""
        flops, names = self._flops(each, computation)
        traffic = self._traffic(each, computation) / self.memory_bytes_per_s
        if _is_attention(each):
            peak = self._chip.attention_efficiency * self._chip.peak_flops
            products = _kernel_flops(each, computation) / peak
            # A GPU runs several kernels: the traffic of some is not hidden behind the
            # products of the others.
            both = products + traffic
            return "attention", max(products, traffic) if self._slice.is_tpu else both
        # Plain attention by the letters of its einsum, kernels by their names.
        attention = "bkgts" in names or "splash" in names or "flash" in names
        peak = self._chip.matmul_efficiency * self._chip.peak_flops
        name = "matmul" if flops else "elementwise"
        return "attention" if attention else name, max(flops / peak, traffic)

    def _flops(self, each: Instruction, computation: Computation) -> tuple[float, str]:
        """Returns the FLOPs of an operation, and the names of its products.

        FLOPs count as often as their format is slower than bfloat16.
        """
        called = each.called("calls") if each.opcode == "fusion" else None
        if called is None:
            return self._slowness(each, computation) * hlo.flops(
                each, computation
            ), each.op_name
        total, names = 0.0, each.op_name
        inner = self._module.computations[called]
        for instruction in inner.instructions:
            more, words = self._flops(instruction, inner)
            total += more
            names += words if more else ""
        return total, names

    def _slowness(self, each: Instruction, computation: Computation) -> float:
        """Returns the time of a product over the time of the same one in bfloat16.

        A GPU multiplies float32 as TF32, at half the rate; a TPU rounds it to bfloat16.
        8-bit numbers have the rate that the chip has for them.
        """
        first = computation.shape(each.operands[0]) if each.operands else None
        if first is None:
            return 1
        if low := _LOW_PRECISION.get(first.kind[:2]):
            return 1 / self._chip.low_precision.get(low, 1)
        return 2 if first.kind == "f32" and not self._slice.is_tpu else 1

    def _traffic(self, each: Instruction, computation: Computation) -> float:
        """Returns the bytes that an operation reads from and writes to the memory."""
        if each.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _hbm_bytes(each)
        called = each.called("calls") if each.opcode == "fusion" else None
        inner = self._module.computations.get(called or "")
        total = _written(each, inner)
        for i, operand in enumerate(each.operands):
            shape = computation.shape(operand)
            if shape is not None and shape.space == 0:
                total += _read(shape, i, inner)
        return total


def _hbm_bytes(each: Instruction) -> int:
    """Returns the bytes of the results that lie in HBM."""
    return sum(shape.nbytes for shape in each.shapes if shape.space == 0)


def _written(each: Instruction, inner: Computation | None) -> int:
    """Returns the bytes written: of an update in place, the update alone."""
    if inner is None:
        return _hbm_bytes(each)
    root = inner.root
    operands = [inner.by_name.get(name.split("#")[0]) for name in root.operands]
    results = [r for r in operands if r] if root.opcode == "tuple" else [root]
    total = 0
    for result, shape in zip(results, each.shapes, strict=False):
        if shape.space == 0:
            in_place = result.opcode == "dynamic-update-slice"
            update = inner.shape(result.operands[1]) if in_place else None
            total += update.nbytes if update else shape.nbytes
    return total


def _read(shape: Shape, index: int, inner: Computation | None) -> float:
    """Returns the bytes read of an operand: of a slice, the slice alone.

    Args:
      shape: of the operand.
      index: of the operand among those of the operation.
      inner: the computation of the operation, if it is a fusion.
    """
    if inner is None:
        return shape.nbytes
    name = next(
        (
            each.name
            for each in inner.instructions
            if each.opcode == "parameter" and each.operands == (str(index),)
        ),
        "",
    )
    users = _readers(("bitcast", "convert"), inner, name)
    if users and all(
        user.opcode in ("dynamic-slice", "slice", "gather") for user, _ in users
    ):
        elements = sum(math.prod(user.shapes[0].dims) for user, _ in users)
        return min(1, elements / max(1, math.prod(shape.dims))) * shape.nbytes
    users = _readers(("bitcast",), inner, name)
    if users and all(
        user.opcode == "dynamic-update-slice" and user.operands[0] == alias
        for user, alias in users
    ):
        return 0  # an update in place does not read the rest of the array
    return shape.nbytes


def _readers(
    opcodes: Sequence[str], inner: Computation, name: str
) -> list[tuple[Instruction, str]]:
    """Returns the readers of a value of a fusion, each with the name that it reads.

    The same bytes in other tiles are the same value.

    Args:
      opcodes: operations that only rename the value; their own readers count.
      inner: the computation of the fusion.
      name: of the value in it.
    """
    readers = []
    for user in inner.users.get(name, []):
        retiled = user.opcode == "fusion" and _RETILED in user.attributes
        if user.opcode in opcodes or retiled:
            readers += _readers(opcodes, inner, user.name)
        else:
            readers.append((user, name))
    return readers


def _is_attention(each: Instruction) -> bool:
    """Returns whether an operation is the attention kernel of a TPU or of cuDNN."""
    return "tpu_custom_call" in each.attributes or _CUDNN in each.attributes


def _kernel_flops(each: Instruction, computation: Computation) -> float:
    """Returns the FLOPs of an attention kernel over causal blocks.

    Forward has two products of T x S x H a head, backward five, or, on TPUs with a
    kernel for the queries alone, four for keys and values and three for queries. All
    of a block on the diagonal counts. Sliding windows are ignored.
    """
    shapes = [computation.shape(operand) for operand in each.operands]
    floats = [s.dims for s in shapes if s and s.kind in ("bf16", "f32", "f16")]
    if len(floats) < 2:
        return 0.0
    query, key = floats[:2]
    name = each.name + each.op_name
    if _CUDNN in each.attributes:
        product = math.prod(query) * key[1]  # B x T x N x H x S
        products, diagonal = 5 if "Backward" in each.attributes else 2, 0.0
    else:
        product = math.prod(query) * key[-2]  # heads x T x H x S
        backward = 5 if len(each.shapes) == 3 else 4
        products = backward if "dkv" in name else 3 if "_dq" in name else 2
        block = _BLOCK.search(each.attributes)
        diagonal = int(block[1]) / key[-2] if block else 0.0
    # Causal: half of the scores, and the other half of the blocks on the diagonal.
    return 2 * products * product * (1 + diagonal) / 2
