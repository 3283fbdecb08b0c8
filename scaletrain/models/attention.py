"""Causal attention over packed sequences: one function, selectable implementation.

Token t may look at token s when s comes no later, both belong to the same document
(equal segment ids) and s lies inside the sliding window. Every implementation obeys
the same contract and is compared with `xla`, the plain reference.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from scaletrain import sharding
from scaletrain.hardware.chips import by_kind
from scaletrain.models import cudnn
from scaletrain.models.mask import visible

SPLASH_BLOCK = 128  # sequences that the kernel takes are multiples of it
# Gradients of queries that the TPU's kernel may keep until it adds them up: one for
# each block of keys. Instead of more, a kernel of their own makes them, in 1.35 times
# the cycles of a backward pass.
SPLASH_COPIES = 8


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys, and which of them count."""

    scale: float
    soft_cap: float = 0.0  # soft_cap * tanh(scores / soft_cap); 0 = off
    window: int = 0  # slots a local layer looks back on, itself included; 0 = all
    reduce: str = "float32"


def _xla(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    how: Scores,
) -> Float[Array, "B T N H"]:
    """Plain attention: all T x S scores at once, softmax in `how.reduce`."""
    window = how.window if local is True else 0
    if not isinstance(local, bool):
        window = jnp.where(local, how.window, jnp.iinfo(jnp.int32).max)
    mask_BTS = visible(q_segments_BT, kv_segments_BS, q_start, window)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    att_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=how.reduce
    )
    att_BKGTS *= how.scale
    if how.soft_cap:
        att_BKGTS = how.soft_cap * jnp.tanh(att_BKGTS / how.soft_cap)
    lowest = jnp.finfo(att_BKGTS.dtype).min
    att_BKGTS = jnp.where(mask_BTS[:, None, None], att_BKGTS, lowest)
    att_BKGTS = jax.nn.softmax(att_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", att_BKGTS, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), "attention")


def _splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    how: Scores,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """The TPU's kernel: blocks of scores in fast memory, empty blocks left out.

    It runs on each device's own sequences and heads; its softmax is in float32.
    """
    assert isinstance(q_start, int), "queries are the keys: there is no cache"

    def here(q_BTNH, k_BSKH, v_BSKH, segments_BT, local):
        def attend(window):
            return _splash_here(
                q_BTNH, k_BSKH, v_BSKH, segments_BT, window, how, interpret
            )

        if isinstance(local, bool):
            return attend(how.window if local else 0)
        return jax.lax.cond(local, lambda: attend(how.window), lambda: attend(0))

    return _on_own_heads(here, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, local)


def _cudnn(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    how: Scores,
) -> Float[Array, "B T N H"]:
    """The GPU's kernel, on each device's own sequences and heads."""
    assert isinstance(q_start, int), "queries are the keys: there is no cache"

    def here(q_BTNH, k_BTKH, v_BTKH, segments_BT, local):
        T = q_BTNH.shape[1]
        window = jnp.where(local, how.window or T, T)
        return cudnn.attention(how.scale, q_BTNH, k_BTKH, v_BTKH, segments_BT, window)

    return _on_own_heads(here, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, local)


def _on_own_heads(
    kernel: Callable[..., Array],
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    local: bool | Bool[Array, ""],
) -> Float[Array, "B T N H"]:
    """Runs `kernel` on each device's own sequences and heads.

    The compiler cannot cut a kernel's call by itself.
    """
    arguments = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads = sharding.spec("batch", "tokens", "heads", "head")
    kv_heads = sharding.spec("batch", "tokens", "kv_heads", "head")
    specs = (heads, kv_heads, kv_heads, sharding.spec("batch", "tokens"))
    if isinstance(local, bool):
        kernel = functools.partial(kernel, local=local)
    else:
        specs, arguments = (*specs, jax.P()), (*arguments, local)
    return sharding.by_device(kernel, specs, heads)(*arguments)


def _splash_here(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"],
    window: int,
    how: Scores,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Returns the kernel's answer for whole sequences on one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    one = (
        splash.LocalMask((T, T), (window - 1, 0), 0)
        if 0 < window < T
        else splash.CausalMask((T, T))
    )
    block = math.gcd(T, _splash_block())
    apart = block if T // block > SPLASH_COPIES else None
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([one] * N),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=apart,
            block_kv_dq=apart,
            use_fused_bwd_kernel=apart is None,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=how.soft_cap or None,
        # What the backward kernel needs of the forward one: saved by this name,
        # a layer that is computed again does not run it twice.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q_BNTH = (q_BTNH.swapaxes(1, 2).astype(how.reduce) * how.scale).astype(q_BTNH.dtype)
    k_BKTH, v_BKTH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    ids = splash.SegmentIds(segments_BT, segments_BT)
    out_BNTH = cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids))
    return out_BNTH.swapaxes(1, 2)


def _splash_block() -> int:
    """Returns the side of the kernel's blocks on the mesh's devices, at most."""
    chip = by_kind(sharding.device_kind())
    return chip.tpu.splash_block if chip and chip.tpu else 512


IMPLEMENTATIONS = {
    "auto": _xla,  # where no mesh has decided, see step.build
    "xla": _xla,
    "cudnn": _cudnn,
    "splash": _splash,
    "splash_interpreted": functools.partial(_splash, interpret=True),
}


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    how: Scores,
    q_start: int | Int[Array, ""] = 0,
    local: bool | Bool[Array, ""] = True,
    implementation: str = "xla",
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores) v over the slots each query may look at.

    N query heads share K key/value heads in groups of N / K (arXiv 2305.13245). What
    the backward pass needs is named "attention" for model.remat_save.

    Args:
      q_start: slot of the first query among the S slots.
      local: whether this layer looks through `how.window`.
    """
    return IMPLEMENTATIONS[implementation](
        q_BTNH, k_BSKH, v_BSKH, q_segments_BT, kv_segments_BS, q_start, local, how
    )
