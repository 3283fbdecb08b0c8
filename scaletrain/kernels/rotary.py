"""Rotary positions on GPUs, fused with the split into queries, keys and values.

XLA splits the result of the fused projection in three passes and concatenates the
gradients in a fourth, at 90% and 80% of the memory bandwidth. One kernel of this module
reads all heads in order and writes queries, keys and values; another does the reverse
for the gradients. Both reach the full bandwidth.
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

_PAIRS = 2048  # pairs of dims in a block; the dims of a pair are rotated together


class Heads(NamedTuple):
    """The layout of a fused projection: heads of queries, then keys, then values.

    There are as many heads of values as of keys.
    """

    queries: int  # N
    keys: int  # K
    size: int  # H, dims of a head


Parts = tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]


def supports(shape_BTD: tuple[int, ...]) -> bool:
    """Whether the mesh's devices run `split_rotated` on tokens of this shape.

    Under tensor parallelism the heads of one device are not contiguous.
    """
    is_even = sharding.shard_shape(shape_BTD[:2], "batch", "tokens") is not None
    is_contiguous = sharding.axis_size("tensor") == 1
    return sharding.platform() == "gpu" and is_contiguous and is_even


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def split_rotated(
    heads_BTF: Float[Array, "B T F"],
    sin_BTP: Float[Array, "B T P"],
    cos_BTP: Float[Array, "B T P"],
    heads: Heads,
    interpret: bool = False,
) -> Parts:
    """Returns queries and keys rotated by their positions, and unchanged values.

    The rotation is that of `layers.rotate`, in float32. The angles have no gradient.

    Args:
      heads_BTF: the fused projection, see `Heads`; F = (N + 2 K) H.
      sin_BTP: sine of the angle of each pair of dims; P = H / 2.
      cos_BTP: cosine of the same angles.
      heads: sizes of the fused projection.
      interpret: runs the kernels in Pallas' interpreter, for tests without a GPU.
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
    parts = _call(_rotary_forward, heads, B * T, outs, streams, interpret)
    return tuple(each.reshape(B, T, -1, H) for each in parts)


def _join_local(heads, interpret, dq_BTNH, dk_BTKH, dv_BTKH, sin_BTP, cos_BTP):
    B, T, N, H = dq_BTNH.shape
    rows = B * T * (N + 2 * heads.keys)
    parts = (each.reshape(-1, H) for each in (dq_BTNH, dk_BTKH, dv_BTKH))
    streams = (*parts, *_flat(sin_BTP, cos_BTP))
    (dheads,) = _call(_rotary_backward, heads, B * T, [(rows, H)], streams, interpret)
    return (dheads.reshape(B, T, -1),)


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
    """Returns the results of a kernel, run on blocks of heads of the fused projection.

    Args:
      kernel: `_rotary_forward` or `_rotary_backward`.
      tokens: number of tokens on this device.
      outs: shapes of the results, [rows, H].
      streams: inputs, [rows, H] for heads and [tokens, P] for angles.
    """
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
    """The heads of one program of a kernel: their rows, tokens, angles and masks.

    All arrays are [heads of the block, pairs]. A row of the fused projection is one
    head of one token.
    """

    def __init__(self, heads: Heads, rows: int, shape: tuple[int, int]):
        N, K, H = heads
        per_token = N + 2 * K
        self.row = pl.program_id(0) * shape[0] + jax.lax.broadcasted_iota(
            jnp.int32, shape, 0
        )
        self.pair = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
        self.half = H // 2
        self.inside = (self.row < rows) & (self.pair < self.half)
        self.token, head = self.row // per_token, self.row % per_token
        self.is_rotated = head < N + K
        ranges = ((N, 0), (K, N), (K, N + K))
        # The rows among queries, keys and values, each with a mask of its heads.
        self.places = [self._place(head - first, count) for count, first in ranges]

    def _place(self, head: Any, count: int) -> tuple[Any, Any]:
        mask = self.inside & (head >= 0) & (head < count)
        # The interpreter writes masked values too: a row beyond the last is harmless.
        return jnp.where(mask, self.token * count + head, 2**30), mask

    def read(self, ref: Any, row: Any, mask: Any) -> tuple[Any, Any]:
        """Returns both halves of the heads in float32, 0 where `mask` is false."""
        one, two = (
            plgpu.load(ref.at[row, self.pair + first], mask=mask, other=0.0)
            for first in (0, self.half)
        )
        return one.astype(jnp.float32), two.astype(jnp.float32)

    def write(self, ref: Any, row: Any, mask: Any, halves: tuple[Any, Any]):
        """Stores both halves of the heads where `mask` is true."""
        for first, half in zip((0, self.half), halves, strict=True):
            target = ref.at[row, self.pair + first]
            plgpu.store(target, half.astype(ref.dtype), mask=mask)

    def angles(self, sin_ref: Any, cos_ref: Any) -> tuple[Any, Any]:
        """Returns sine and cosine; heads of values have angle 0."""
        mask = self.inside & self.is_rotated
        sin = plgpu.load(sin_ref.at[self.token, self.pair], mask=mask, other=0.0)
        cos = plgpu.load(cos_ref.at[self.token, self.pair], mask=mask, other=1.0)
        return sin, cos


def _rotated(halves: tuple[Any, Any], sin: Any, cos: Any) -> tuple[Any, Any]:
    one, two = halves
    return one * cos - two * sin, two * cos + one * sin


def _rotary_forward(heads, rows, shape, heads_ref, sin_ref, cos_ref, *refs):
    block = _Block(heads, rows, shape)
    sin, cos = block.angles(sin_ref, cos_ref)
    halves = _rotated(block.read(heads_ref, block.row, block.inside), sin, cos)
    for ref, place in zip(refs, block.places, strict=True):
        block.write(ref, *place, halves)


def _rotary_backward(heads, rows, shape, *refs):
    *parts, sin_ref, cos_ref, heads_ref = refs
    block = _Block(heads, rows, shape)
    sin, cos = block.angles(sin_ref, cos_ref)
    gradients = [
        block.read(ref, *place) for ref, place in zip(parts, block.places, strict=True)
    ]
    # A head is in one part; what the other two give for it is masked to 0.
    one, two = (sum(each[i] for each in gradients) for i in (0, 1))
    # The gradient of a rotation is the rotation by the negative angle.
    block.write(heads_ref, block.row, block.inside, _rotated((one, two), -sin, cos))
