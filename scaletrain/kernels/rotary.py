"""Rotary positions on GPUs, between the matmul of queries, keys and values and them.

XLA cuts the matmul's result in three passes and lays the gradients side by side again
in a fourth, at 90% and 80% of the speed of memory. Here one kernel reads all heads in a
row and writes each to its place, and another does so backwards, at all of it.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from scaletrain import sharding

_PAIRS = 2048  # of dims that turn together, in a block


class Heads(NamedTuple):
    """The heads that lie beside each other: queries', keys', and as many values'."""

    queries: int
    keys: int
    size: int


Parts = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


def supports(shape_BTD: tuple[int, ...]) -> bool:
    """Whether the mesh's devices run `split_rotated` on tokens of this shape.

    With a tensor axis the heads of a device do not lie beside each other.
    """
    even = sharding.shard_shape(shape_BTD[:2], "batch", "tokens") is not None
    alone = sharding.axis_size("tensor") == 1
    return sharding.platform() == "gpu" and alone and even


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def split_rotated(
    heads_BTF: Float[Array, "B T F"],
    sin_BTP: Float[Array, "B T P"],
    cos_BTP: Float[Array, "B T P"],
    heads: Heads,
    interpret: bool = False,
) -> Parts:
    """Returns queries and keys turned by their positions, and values as they are.

    As `layers.rotate` turns them, in float32; the angles have no gradient.

    Args:
      heads_BTF: all of them, queries first; F = (N + 2 K) H.
      sin_BTP: of the angle of each pair of dims; P = H / 2.
    """
    return _forward(heads_BTF, sin_BTP, cos_BTP, heads, interpret)[0]


def _forward(heads_BTF, sin_BTP, cos_BTP, heads, interpret):
    local = functools.partial(_split_local, heads, interpret)
    run = sharding.on_local_rows(local, ("BTF", "BTP", "BTP"), ("BTNH", "BTKH", "BTKH"))
    parts = run(heads_BTF, sin_BTP, cos_BTP)
    return parts, (sin_BTP, cos_BTP)


def _backward(heads, interpret, angles, cotangents):
    local = functools.partial(_join_local, heads, interpret)
    dims = "BTNH", "BTKH", "BTKH", "BTP", "BTP"
    (dheads_BTF,) = sharding.on_local_rows(local, dims, ("BTF",))(*cotangents, *angles)
    return dheads_BTF, *(jnp.zeros_like(each) for each in angles)


split_rotated.defvjp(_forward, _backward)


def _split_local(heads, interpret, heads_BTF, sin_BTP, cos_BTP):
    B, T, _ = heads_BTF.shape
    N, K, H = heads
    outs = [(B * T * n, H) for n in (N, K, K)]
    streams = (heads_BTF.reshape(-1, H), *_flat(sin_BTP, cos_BTP))
    found = _call(_rotary_forward, heads, B * T, outs, streams, interpret)
    return tuple(each.reshape(B, T, -1, H) for each in found)


def _join_local(heads, interpret, dq_BTNH, dk_BTKH, dv_BTKH, sin_BTP, cos_BTP):
    B, T, N, H = dq_BTNH.shape
    rows = B * T * (N + 2 * heads.keys)
    parts = (each.reshape(-1, H) for each in (dq_BTNH, dk_BTKH, dv_BTKH))
    streams = (*parts, *_flat(sin_BTP, cos_BTP))
    (found,) = _call(_rotary_backward, heads, B * T, [(rows, H)], streams, interpret)
    return (found.reshape(B, T, -1),)


def _flat(*angles: Array) -> tuple[Array, ...]:
    return tuple(each.reshape(-1, each.shape[-1]) for each in angles)


def _call(
    kernel: Callable[..., None],
    heads: Heads,
    tokens: int,
    outs: Any,
    streams: tuple[Array, ...],
    interpret: bool,
) -> Any:
    """Runs a kernel whose blocks are some heads, of all that lie beside each other."""
    pairs = pl.next_power_of_2(heads.size // 2)
    block = max(1, _PAIRS // pairs)
    rows = tokens * (heads.queries + 2 * heads.keys)
    return pl.pallas_call(
        functools.partial(kernel, heads, rows, (block, pairs)),
        grid=(pl.cdiv(rows, block),),
        out_shape=[jax.ShapeDtypeStruct(out, streams[0].dtype) for out in outs],
        compiler_params=plgpu.CompilerParams(num_warps=4),
        interpret=interpret,
        name=kernel.__name__.strip("_"),
    )(*streams)


class _Block:
    """The heads that a program takes: where each comes from and how far it turns."""

    def __init__(self, heads: Heads, rows: int, shape: tuple[int, int]):
        N, K, H = heads
        every = N + 2 * K
        self.row = pl.program_id(0) * shape[0] + jax.lax.broadcasted_iota(
            jnp.int32, shape, 0
        )
        self.pair = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.half = H // 2
        self.inside = (self.row < rows) & (self.pair < self.half)
        self.token, head = self.row // every, self.row % every
        self.turns = head < N + K
        firsts = ((N, 0), (K, N), (K, N + K))
        # The head's rows among queries, keys and values, and whether it has one.
        self.places = [self._place(head - first, count) for count, first in firsts]

    def _place(self, head: Any, count: int) -> tuple[Any, Any]:
        here = self.inside & (head >= 0) & (head < count)
        # Interpreted, what is masked is written too: beyond the last it does no harm.
        return jnp.where(here, self.token * count + head, 2**30), here

    def read(self, ref: Any, row: Any, mask: Any) -> tuple[Any, Any]:
        """Returns both halves of heads in float32, 0 where masked."""
        one, two = (
            plgpu.load(ref.at[row, self.pair + first], mask=mask, other=0.0)
            for first in (0, self.half)
        )
        return one.astype(jnp.float32), two.astype(jnp.float32)

    def write(self, ref: Any, row: Any, mask: Any, halves: tuple[Any, Any]):
        """Stores both halves of the heads that are not masked."""
        for first, half in zip((0, self.half), halves, strict=True):
            place = ref.at[row, self.pair + first]
            plgpu.store(place, half.astype(ref.dtype), mask=mask)

    def angles(self, sin_ref: Any, cos_ref: Any) -> tuple[Any, Any]:
        """Returns sine and cosine; those of values are of no angle."""
        mask = self.inside & self.turns
        sin = plgpu.load(sin_ref.at[self.token, self.pair], mask=mask, other=0.0)
        cos = plgpu.load(cos_ref.at[self.token, self.pair], mask=mask, other=1.0)
        return sin, cos


def _turned(halves: tuple[Any, Any], sin: Any, cos: Any) -> tuple[Any, Any]:
    one, two = halves
    return one * cos - two * sin, two * cos + one * sin


def _rotary_forward(heads, rows, shape, heads_ref, sin_ref, cos_ref, *refs):
    block = _Block(heads, rows, shape)
    sin, cos = block.angles(sin_ref, cos_ref)
    halves = _turned(block.read(heads_ref, block.row, block.inside), sin, cos)
    for ref, place in zip(refs, block.places, strict=True):
        block.write(ref, *place, halves)


def _rotary_backward(heads, rows, shape, *refs):
    *parts, sin_ref, cos_ref, heads_ref = refs
    block = _Block(heads, rows, shape)
    sin, cos = block.angles(sin_ref, cos_ref)
    found = [
        block.read(ref, *place) for ref, place in zip(parts, block.places, strict=True)
    ]
    one, two = (sum(each[i] for each in found) for i in (0, 1))
    block.write(heads_ref, block.row, block.inside, _turned((one, two), -sin, cos))
