"""Token losses. Every reduction returns its sum and what to divide it by."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class LossSums(NamedTuple):
    """Sums over weighted tokens; divide by `weight` for a mean per token."""

    loss: Float[Array, ""]  # cross-entropy, nats
    z: Float[Array, ""]  # log(Z)^2
    weight: Float[Array, ""]  # tokens


@jax.named_scope("loss")
def next_token_loss(
    logits_BTV: Float[Array, "B T V"],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> LossSums:
    """Returns summed next-token cross-entropy.

    Args:
      weights_BT: 0 leaves a token out of every sum.

    Source: PaLM (arXiv 2204.02311) section 5 for the log(Z)^2 term.
    """
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    # A comparison instead of a gather: it stays local when the vocabulary is split.
    vocab_11V = jnp.arange(logits_BTV.shape[-1])[None, None]
    hit_BTV = vocab_11V == targets_BT[:, :, None]
    picked_BT = jnp.sum(jnp.where(hit_BTV, logits_BTV, 0), axis=-1)
    return LossSums(
        loss=jnp.sum((log_z_BT - picked_BT) * weights_BT),
        z=jnp.sum(jnp.square(log_z_BT) * weights_BT),
        weight=jnp.sum(weights_BT),
    )
