"""Optimizer and schedule from settings, all of them optax transformations.

What the step hands over are sums over tokens, not means (`Sums`): only after the last
micro-batch is the number of weighted tokens known, and dividing once by it makes any
cutting of a batch give the gradient of the whole batch.
"""

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from scaletrain import muon
from scaletrain.config import MAX_SPIKE_WINDOW, RunConfig

Tree = Any  # nested dicts mirroring the parameters
MASKED = optax.MaskedNode()


class Sums(NamedTuple):
    """What one forward and backward pass adds up, over its weighted tokens."""

    params: Tree  # gradient of the summed loss
    loss: Float[Array, ""]
    weight: Float[Array, ""]
    bad: Float[Array, ""]  # micro-batches left out because they were not finite


class GuardState(NamedTuple):
    """State of `guarded`: the inner state and what the last update saw."""

    inner: Any
    loss: Float[Array, ""]  # nats per token
    grad_norm: Float[Array, ""]  # of the mean gradient, before clipping
    limits: Float[Array, "2"]  # what loss and grad_norm were not to exceed
    skipped_in_a_row: Int[Array, ""]
    skipped: Int[Array, ""]
    applied: Int[Array, ""]
    recent: Float[Array, "W 2"]  # loss and grad_norm of updates applied, a ring


def schedule(run: RunConfig) -> optax.Schedule:
    """Returns optimizer step -> learning rate, the first step being 0.

    Of W warm-up steps the first has 1/W of the peak, the last the peak. "cosine" and
    "linear" fall from the peak in the step after them to the final rate in the step
    after the last of the run; "wsd" has the final rate in the last step itself.
    """
    o, steps = run.optim, run.num_steps
    peak, final, warmup = (
        o.learning_rate,
        o.learning_rate * o.final_ratio,
        o.warmup_steps,
    )
    rest = steps - warmup
    main: optax.Schedule
    if o.schedule == "constant":
        main = optax.constant_schedule(peak)
    elif o.schedule == "cosine":
        main = optax.cosine_decay_schedule(peak, rest, alpha=o.final_ratio)
    elif o.schedule == "linear":
        main = optax.linear_schedule(peak, final, rest)
    elif o.schedule == "wsd":  # arXiv 2404.06395 section 4
        decay = min(o.decay_steps or max(1, steps // 5), rest)
        down = optax.linear_schedule(peak, final, decay)
        # It falls from the step before the first of `decay`, which still has the peak,
        # so that the last step has the final rate.
        main = optax.join_schedules(
            [optax.constant_schedule(peak), down], [rest - decay - 1]
        )
    else:
        main = functools.partial(_inverse_sqrt, peak, max(warmup, 1))

    # The first step already learns: 1/warmup of the peak, not 0.
    up = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([up, main], [warmup]) if warmup else main


def _inverse_sqrt(peak: float, reach: int, step: Any) -> Any:
    return peak * jnp.sqrt(reach / (reach + jnp.maximum(step, 0)))


def _is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter with these logical axes is multiplied, not added."""
    return "embed" in axes or "rank" in axes


def _is_embedding(axes: tuple[str, ...]) -> bool:
    return "vocab" in axes or "positions" in axes


def _map_axes(function: Any, logical: Tree) -> Tree:
    return jax.tree.map(function, logical, is_leaf=lambda x: isinstance(x, tuple))


def _is_turned(axes: tuple[str, ...]) -> bool:
    """Whether Muon takes a parameter with these logical axes; Adam takes the rest."""
    return _is_matrix(axes) and not _is_embedding(axes) and "rank" not in axes


def _direction(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    """Returns the unscaled direction of each optimizer, uphill like a gradient."""
    o = run.optim
    if o.name == "adamw":
        return optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)
    if o.name == "lion":
        return optax.scale_by_lion(b1=o.b1, b2=o.b2)
    if o.name == "sgd":
        return optax.trace(decay=o.b1)
    if o.name == "adafactor":
        return optax.chain(optax.adafactor(None), optax.scale(-1.0))
    kinds = _map_axes(lambda axes: "muon" if _is_turned(axes) else "adam", logical)
    turned = _map_axes(lambda axes: axes if _is_turned(axes) else MASKED, logical)
    return optax.partition(
        {
            "muon": muon.scale_by_muon(turned, run.precision.compute),
            "adam": optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps, nesterov=True),
        },
        kinds,
    )


def optimizer(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    """Returns the transformation of `Sums` into parameter updates.

    Args:
      logical: the logical axes of each parameter; they tell matrices, the only ones
        that decay and that Muon turns, from norms, biases and embeddings.
    """
    o = run.optim
    decays = _map_axes(
        lambda axes: (
            _is_matrix(axes)
            and (o.decay_embeddings == "yes" or not _is_embedding(axes))
        ),
        logical,
    )
    parts = [
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        _direction(run, logical),
        optax.add_decayed_weights(o.weight_decay, mask=decays),
        optax.scale_by_learning_rate(schedule(run)),
    ]
    tx = guarded(optax.chain(*parts), o.spike_sigma, o.spike_window)
    if o.accumulate == "multi_steps":
        tx = _accumulated(tx, run.accumulate_steps)
    return tx


def guarded(
    inner: optax.GradientTransformation, sigma: float = 0.0, window: int = 128
) -> optax.GradientTransformation:
    """Returns `inner` fed with means over tokens and spared what is not sound.

    What is not finite is left out, and with `sigma` a loss or gradient norm that many
    standard deviations above its mean over the last `window` updates that were applied.

    `optax.apply_if_finite` decides with a branch, which keeps XLA from fusing the
    update into the gradient, and gives in after a while; this selects, and never does.
    """

    def init(sums: Sums) -> GuardState:
        zero, count = jnp.zeros(()), jnp.zeros((), jnp.int32)
        limits, recent = jnp.full(2, jnp.inf), jnp.zeros((MAX_SPIKE_WINDOW, 2))
        state = inner.init(sums.params)
        return GuardState(state, zero, zero, limits, count, count, count, recent)

    def update(sums: Sums, state: GuardState, params: Sums) -> tuple[Sums, GuardState]:
        weight = jnp.maximum(sums.weight, 1)
        mean = jax.tree.map(lambda g: (g / weight).astype(g.dtype), sums.params)
        wide = jax.tree.map(lambda g: g.astype(jnp.float32), mean)
        loss, norm = sums.loss / weight, optax.tree.norm(wide)
        seen, limits = jnp.stack([loss, norm]), _limits(state, sigma, window)
        # An infinite limit does not make an infinite loss a sound one.
        good = (sums.bad == 0) & jnp.all(jnp.isfinite(seen) & (seen <= limits))
        updates, new = inner.update(mean, state.inner, params.params)
        updates = jax.tree.map(lambda u: jnp.where(good, u, 0), updates)
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state.inner)
        place = state.applied % MAX_SPIKE_WINDOW
        guard = GuardState(
            inner=new,
            loss=loss,
            grad_norm=norm,
            limits=limits,
            skipped_in_a_row=jnp.where(good, 0, state.skipped_in_a_row + 1),
            skipped=state.skipped + ~good,
            applied=state.applied + good,
            recent=jnp.where(good, state.recent.at[place].set(seen), state.recent),
        )
        return jax.tree.map(jnp.zeros_like, sums)._replace(params=updates), guard

    return optax.GradientTransformation(cast(Any, init), cast(Any, update))


def _limits(state: GuardState, sigma: float, window: int) -> Float[Array, "2"]:
    """Returns mean + sigma x standard deviation; infinite until the window is full.

    All of the ring is kept whatever the window, so that both settings may change
    between two attempts at a run.
    """
    if not sigma:
        return jnp.full(2, jnp.inf)
    age_W = (state.applied - 1 - jnp.arange(MAX_SPIKE_WINDOW)) % MAX_SPIKE_WINDOW
    inside_W1 = (age_W < window)[:, None]
    mean = jnp.mean(state.recent, axis=0, where=inside_W1)
    limits = mean + sigma * jnp.std(state.recent, axis=0, where=inside_W1)
    return jnp.where(state.applied >= window, limits, jnp.inf)


def _accumulated(
    inner: optax.GradientTransformation, steps: int
) -> optax.GradientTransformation:
    """Returns `inner` applied to the sums of `steps` calls.

    A micro-batch that is not finite is flagged and left out: optax.MultiSteps clears
    its sums by multiplying with 0, so a NaN in them would stay for good.
    """
    multi = optax.MultiSteps(inner, steps, use_grad_mean=False)

    def update(sums: Sums, state: Any, params: Sums) -> tuple[Sums, Any]:
        leaves = jax.tree.leaves(sums)
        good = jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]))
        sums = jax.tree.map(lambda leaf: jnp.where(good, leaf, 0), sums)
        sums = sums._replace(bad=jnp.where(good, 0.0, 1.0))
        updates, state = multi.update(sums, state, params)
        # Before the last call the inner update saw part of a batch; MultiSteps
        # multiplies it by 0, which keeps what is not finite.
        done = multi.has_updated(state)
        return jax.tree.map(lambda u: jnp.where(done, u, 0), updates), state

    return optax.GradientTransformation(multi.init, cast(Any, update))


def as_sums(params: Tree) -> Sums:
    """Returns `params` in the shape the transformation works on."""
    zero = jnp.zeros(())
    return Sums(params, zero, zero, zero)


def guard_of(state: Any) -> GuardState:
    """Returns what the last whole step saw, from either kind of state."""
    return state if isinstance(state, GuardState) else state.inner_opt_state
