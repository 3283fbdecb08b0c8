"""Learning-rate schedules; a new one is a function and a row in `_SCHEDULES`."""

from typing import Any

import jax.numpy as jnp
import optax

from scaletrain.config import RunConfig


def schedule(run: RunConfig) -> optax.Schedule:
    """Returns the function from optimizer step, from 0 on, to learning rate.

    Of W warm-up steps the first has 1/W of the peak, the last the peak. "cosine" and
    "linear" fall from the peak in the step after them to the final rate in the step
    after the last of the run; "wsd" has the final rate in the last step itself.

    Example:
      >>> from scaletrain.config import OptimConfig
      >>> optim = OptimConfig(learning_rate=1.0, warmup_steps=4)
      >>> [float(schedule(RunConfig(optim=optim))(step)) for step in range(4)]
      [0.25, 0.5, 0.75, 1.0]
    """
    peak, warmup = run.optim.learning_rate, run.optim.warmup_steps
    after = _SCHEDULES[run.optim.schedule](run, run.num_steps - warmup)
    # The first step already learns: 1/warmup of the peak, not 0.
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


# Each takes the run and the number of steps after its warm-up, and counts from there.


def _constant(run: RunConfig, steps: int) -> optax.Schedule:
    return optax.constant_schedule(run.optim.learning_rate)


def _cosine(run: RunConfig, steps: int) -> optax.Schedule:
    o = run.optim
    return optax.cosine_decay_schedule(o.learning_rate, steps, alpha=o.final_ratio)


def _linear(run: RunConfig, steps: int) -> optax.Schedule:
    peak = run.optim.learning_rate
    return optax.linear_schedule(peak, peak * run.optim.final_ratio, steps)


def _wsd(run: RunConfig, steps: int) -> optax.Schedule:
    """Returns the stable and the decay phase of WSD (arXiv 2404.06395 section 4)."""
    o = run.optim
    decay = min(o.decay_steps or max(1, run.num_steps // 5), steps)
    stable = optax.constant_schedule(o.learning_rate)
    # It falls from the step before the first of `decay`, which still has the peak, so
    # that the last step has the final rate.
    return optax.join_schedules(
        [stable, _linear(run, decay)], boundaries=[steps - decay - 1]
    )


def _inverse_sqrt(run: RunConfig, steps: int) -> optax.Schedule:
    peak, reach = run.optim.learning_rate, max(run.optim.warmup_steps, 1)

    def rate(step: Any) -> Any:
        return peak * jnp.sqrt(reach / (reach + jnp.maximum(step, 0)))

    return rate


_SCHEDULES = {
    "constant": _constant,
    "cosine": _cosine,
    "inverse_sqrt": _inverse_sqrt,
    "linear": _linear,
    "wsd": _wsd,
}
