"""Causal attention over packed sequences: one function, selectable implementation.

Token t may look at token s when s comes no later, both belong to the same document
(equal segment ids) and s lies inside the sliding window. Every implementation obeys
the same contract and is compared with `xla`, the plain reference.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def visible(
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    window: int | Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """Returns which key/value slots each query may look at.

    Args:
      q_start: slot of the first query among the S slots; slots count from 0.
      window: slots a query looks back on, itself included; 0 = all.
    """
    q_T1 = q_start + jnp.arange(q_segments_BT.shape[1])[:, None]
    kv_1S = jnp.arange(kv_segments_BS.shape[1])[None, :]
    mask_TS = kv_1S <= q_T1
    if not isinstance(window, int) or window:
        mask_TS &= kv_1S > q_T1 - window
    return mask_TS[None] & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])


def _xla(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask_BTS: Bool[Array, "B T S"],
    scale: float,
    soft_cap: float,
    reduce: str,
) -> Float[Array, "B T N H"]:
    """Plain attention: all T x S scores at once, softmax in `reduce`."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    att_BKGTS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BTKGH, k_BSKH, preferred_element_type=reduce
    )
    att_BKGTS *= scale
    if soft_cap:
        att_BKGTS = soft_cap * jnp.tanh(att_BKGTS / soft_cap)
    lowest = jnp.finfo(att_BKGTS.dtype).min
    att_BKGTS = jnp.where(mask_BTS[:, None, None], att_BKGTS, lowest)
    att_BKGTS = jax.nn.softmax(att_BKGTS, axis=-1).astype(v_BSKH.dtype)
    out_BTKGH = jnp.einsum("bkgts,bskh->btkgh", att_BKGTS, v_BSKH)
    return out_BTKGH.reshape(B, T, N, H)


IMPLEMENTATIONS = {"xla": _xla}


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    *,
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""] = 0,
    window: int | Int[Array, ""] = 0,
    scale: float = 0.0,
    soft_cap: float = 0.0,
    implementation: str = "xla",
    reduce: str = "float32",
) -> Float[Array, "B T N H"]:
    """Returns softmax(scale q k) v over the slots each query may look at.

    N query heads share K key/value heads in groups of N / K (arXiv 2305.13245).

    Args:
      window: slots a query looks back on, itself included; 0 = all.
      scale: 0 = H^-0.5.
      soft_cap: scores become soft_cap * tanh(scores / soft_cap); 0 = off.
    """
    scale = scale or q_BTNH.shape[-1] ** -0.5
    mask_BTS = visible(q_segments_BT, kv_segments_BS, q_start, window)
    return IMPLEMENTATIONS[implementation](
        q_BTNH, k_BSKH, v_BSKH, mask_BTS, scale, soft_cap, reduce
    )
