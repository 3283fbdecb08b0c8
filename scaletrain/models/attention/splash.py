"""The TPU's attention kernel, as jax ships it."""

import math
from typing import cast

import jax
from jaxtyping import Array, Bool, Float, Int

from scaletrain import sharding
from scaletrain.hardware.chips import by_kind
from scaletrain.models.attention.scores import Scores, on_local_heads

BLOCK = 128  # the kernel takes sequences of a multiple of it
# Most copies of the queries' gradient, one for each block of keys, that the fused
# backward kernel writes before it sums them. With more blocks a separate kernel
# computes that gradient, and a backward pass takes 1.35 times the cycles.
COPIES = 8


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    scores: Scores,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Returns attention by the kernel, which skips blocks that the mask hides.

    It runs on the sequences and heads of each device; its softmax is in float32.

    Args:
      q_segments_BT: document of each query; equal ids see each other.
      kv_segments_BS: document of each key.
      q_start: slot of the first query among the S slots.
      local: whether the layer looks through `scores.window`.
      scores: how scores are made.
    """
    assert isinstance(q_start, int), "queries are the keys: there is no cache"

    def local_attend(q_BTNH, k_BSKH, v_BSKH, segments_BT, local):
        def windowed(window):
            return _attend_local(
                q_BTNH, k_BSKH, v_BSKH, segments_BT, window, scores, interpret
            )

        if isinstance(local, bool):
            return windowed(scores.window if local else 0)
        return jax.lax.cond(local, lambda: windowed(scores.window), lambda: windowed(0))

    return on_local_heads(local_attend, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, local)


def _attend_local(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segments_BT: Int[Array, "B T"],
    window: int,
    scores: Scores,
    interpret: bool,
) -> Float[Array, "B T N H"]:
    """Returns the kernel's output for complete sequences on one device."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    T, N = q_BTNH.shape[1:3]
    mask = (
        splash.LocalMask((T, T), (window - 1, 0), 0)
        if 0 < window < T
        else splash.CausalMask((T, T))
    )
    block = math.gcd(T, _block())
    dq_block = block if T // block > COPIES else None
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * N),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_kv_compute=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_kv_dkv_compute=block,
            block_q_dq=dq_block,
            block_kv_dq=dq_block,
            use_fused_bwd_kernel=dq_block is None,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=scores.soft_cap or None,
        # By this name remat can save the residuals, so that a layer that is recomputed
        # does not run the forward kernel again.
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q_BNTH = (q_BTNH.swapaxes(1, 2).astype(scores.reduce) * scores.scale).astype(
        q_BTNH.dtype
    )
    k_BKTH, v_BKTH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    ids = splash.SegmentIds(segments_BT, segments_BT)
    out_BNTH = cast(jax.Array, jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids))
    return out_BNTH.swapaxes(1, 2)


def _block() -> int:
    """Returns the largest side of the kernel's blocks on the mesh's devices."""
    chip = by_kind(sharding.device_kind())
    return chip.tpu.splash_block if chip and chip.tpu else 512
