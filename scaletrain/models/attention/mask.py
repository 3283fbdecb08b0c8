"""The attention mask of packed sequences."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def visible(
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    window: int | Int[Array, ""],
) -> Bool[Array, "B T S"]:
    """Returns the mask of the key/value slots that each query may look at.

    Args:
      q_segments_BT: document of each query.
      kv_segments_BS: document of each slot.
      q_start: slot of the first query among the S slots; slots count from 0.
      window: slots a query looks back on, itself included; 0 = all.
    """
    q_T1 = q_start + jnp.arange(q_segments_BT.shape[1])[:, None]
    kv_1S = jnp.arange(kv_segments_BS.shape[1])[None, :]
    mask_TS = kv_1S <= q_T1
    if not isinstance(window, int) or window:
        mask_TS &= kv_1S > q_T1 - window
    return mask_TS[None] & (q_segments_BT[:, :, None] == kv_segments_BS[:, None, :])
