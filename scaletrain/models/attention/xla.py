"""Attention as plain operations: the reference, which runs on every platform."""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from scaletrain.models.attention.mask import visible
from scaletrain.models.attention.scores import Scores


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """Returns plain attention: all T x S scores at once, softmax in `scores.reduce`.

    Args:
      q_segments_BT: document of each query; equal ids see each other.
      kv_segments_BS: document of each key.
      q_start: slot of the first query among the S slots.
      local: whether the layer looks through `scores.window`.
      scores: how scores are made.
    """
    window = scores.window if local is True else 0
    if not isinstance(local, bool):
        window = jnp.where(local, scores.window, jnp.iinfo(jnp.int32).max)
    mask_BTS = visible(q_segments_BT, kv_segments_BS, q_start, window)
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    att_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=scores.reduce
    )
    att_BKGTS *= scores.scale
    if scores.soft_cap:
        att_BKGTS = scores.soft_cap * jnp.tanh(att_BKGTS / scores.soft_cap)
    lowest = jnp.finfo(att_BKGTS.dtype).min
    att_BKGTS = jnp.where(mask_BTS[:, None, None], att_BKGTS, lowest)
    att_BKGTS = jax.nn.softmax(att_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", att_BKGTS, v_BSKH)
    return checkpoint_name(out_BTKGH.reshape(B, T, N, H), "attention")
