"""The guard of an optimizer: one division by tokens, and skipped updates."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from scaletrain.config import MAX_SPIKE_WINDOW

Tree = Any  # nested dicts mirroring the parameters


class GuardState(NamedTuple):
    """The state of `guarded`: the inner state and facts about the last update."""

    inner: Any
    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]  # of the mean gradient, before clipping
    limits: Float[Array, "2"]  # largest loss and grad_norm allowed
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]
    applied: Int[Array, ""]
    recent: Float[Array, "W 2"]  # loss and grad_norm of updates applied, a ring


def guarded(
    inner: optax.GradientTransformation, sigma: float = 0.0, window: int = 128
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` wrapped: it gets mean gradients, and bad updates are skipped.

    `update` takes gradients summed over tokens, and by name `loss` (the sum, in nats),
    `tokens` (their weight) and `finite` (whether the step's amax values all are).
    An update is skipped if the loss, the gradient or an amax is not finite, and with
    `sigma` if loss or gradient norm is that many standard deviations above its mean
    over the last `window` updates that were applied.

    `optax.apply_if_finite` decides with a branch, which keeps XLA from fusing the
    update into the gradient, and applies an update after a number of failures; this
    wrapper selects, and always skips.

    Args:
      inner: the optimizer.
      sigma: standard deviations above the mean; 0 = skip only non-finite updates.
      window: applied updates that mean and deviation are of.
    """

    def init(params: Tree) -> GuardState:
        zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
        limits, recent = jnp.full(2, jnp.inf), jnp.zeros((MAX_SPIKE_WINDOW, 2))
        state = inner.init(params)
        return GuardState(state, zero, zero, limits, count, count, count, recent)

    def update(
        grads: Tree,
        state: GuardState,
        params: Tree,
        *,
        loss: Float[Array, ""],
        tokens: Float[Array, ""],
        finite: Bool[Array, ""],
    ) -> tuple[Tree, GuardState]:
        tokens = jnp.maximum(tokens, 1)
        mean = jax.tree.map(lambda g: (g / tokens).astype(g.dtype), grads)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), mean)
        loss, norm = loss / tokens, optax.tree.norm(wide)
        now, limits = jnp.stack([loss, norm]), _limits(state, sigma, window)
        # An infinite limit does not make an infinite loss a sound one.
        sound = finite & jnp.all(jnp.isfinite(now) & (now <= limits))
        updates, new = inner.update(mean, state.inner, params)
        updates = jax.tree.map(lambda u: jnp.where(sound, u, 0), updates)
        new = jax.tree.map(lambda n, o: jnp.where(sound, n, o), new, state.inner)
        slot = state.applied % MAX_SPIKE_WINDOW
        return updates, GuardState(
            inner=new,
            loss=loss,
            grad_norm=norm,
            limits=limits,
            skipped_in_a_row=jnp.where(sound, 0, state.skipped_in_a_row + 1),
            skipped=state.skipped + ~sound,
            applied=state.applied + sound,
            recent=jnp.where(sound, state.recent.at[slot].set(now), state.recent),
        )

    return optax.GradientTransformationExtraArgs(cast(Any, init), cast(Any, update))


def _limits(state: GuardState, sigma: float, window: int) -> Float[Array, "2"]:
    """Returns mean + sigma x standard deviation; infinite until the window is full.

    The ring's size does not depend on the window, so that both settings may change when
    a run is resumed.

    Args:
      state: with loss and gradient norm of the last updates.
      sigma: 0 = no limits.
      window: updates.
    """
    if not sigma:
        return jnp.full(2, jnp.inf)
    age_W = (state.applied - 1 - jnp.arange(MAX_SPIKE_WINDOW)) % MAX_SPIKE_WINDOW
    inside_W1 = (age_W < window)[:, None]
    mean = jnp.mean(state.recent, axis=0, where=inside_W1)
    limits = mean + sigma * jnp.std(state.recent, axis=0, where=inside_W1)
    return jnp.where(state.applied >= window, limits, jnp.inf)
