"""Learning-rate schedules, by name."""

import functools
from typing import Any

import jax.numpy as jnp
import optax

from scaletrain.config import RunConfig


def schedule(run: RunConfig) -> optax.Schedule:
    """Returns optimizer step -> learning rate."""
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
        main = optax.join_schedules(
            [optax.constant_schedule(peak), down], [rest - decay]
        )
    else:
        main = functools.partial(_inverse_sqrt, peak, max(warmup, 1))

    # The first step already learns: 1/warmup of the peak, not 0.
    up = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([up, main], [warmup]) if warmup else main


def _inverse_sqrt(peak: float, reach: int, step: Any) -> Any:
    return peak * jnp.sqrt(reach / (reach + jnp.maximum(step, 0)))
