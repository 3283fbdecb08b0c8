"""Gradient accumulation: a batch in micro-batches, one after another, inside the step.

Both wrappers are optax's. `microbatch` (`optax.microbatching`) adds in place;
`multi_steps` (`optax.MultiSteps`) needs memory for one more gradient. Micro-batch i of
N has the rows i, i + N, i + 2 N, ...: no row moves to another device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Tree = Any
# Returns ((loss, sums), (gradients, amax)) of (params, amax, frozen, batch).
Gradient = Callable[[Tree, Tree, Tree, Tree], Any]

_SUM = optax.microbatching.AccumulationType.SUM
_MAX = optax.microbatching.Accumulator(
    init=lambda values: jax.tree.map(jnp.zeros_like, values),
    update=lambda carry, values, _: jax.tree.map(jnp.maximum, carry, values),
    finalize=lambda carry: carry,
    aggregate=lambda values: jax.tree.map(lambda x: jnp.max(x, axis=0), values),
)
_RESULTS = (_SUM, (_SUM, _MAX))  # (loss, sums), (gradients, amax)


def accumulated(gradient: Gradient, wrapper: str, micro_batches: int) -> Gradient:
    """Returns `gradient` computed in micro-batches.

    Loss, sums and gradients are summed; amax values are maximised.

    Args:
      gradient: a function of (params, amax, frozen, batch).
      wrapper: "microbatch" or "multi_steps", as `optim.accumulate`.
      micro_batches: their number, which divides the rows of each batch.
    """
    return _WRAPPERS[wrapper](gradient, micro_batches)


def _microbatch(gradient: Gradient, micro_batches: int) -> Gradient:
    def summed(params: Tree, amax: Tree, frozen: Tree, batch: Tree) -> Any:
        rows = jax.tree.leaves(batch)[0].shape[0] // micro_batches
        each = optax.microbatching.microbatch(gradient, 3, rows, _RESULTS)
        return each(params, amax, frozen, batch)

    return summed


def _multi_steps(gradient: Gradient, micro_batches: int) -> Gradient:
    multi = optax.MultiSteps(optax.identity(), micro_batches, use_grad_mean=False)

    def summed(params: Tree, amax: Tree, frozen: Tree, batch: Tree) -> Any:
        rows = jax.tree.leaves(batch)[0].shape[0] // micro_batches

        def add(carry: Any, micro_batch: Tree) -> tuple[Any, Any]:
            sums, (grads, new_amax) = gradient(params, amax, frozen, micro_batch)
            # MultiSteps adds in the format of the parameters.
            grads = optax.tree.cast_like(grads, params)
            total, state = multi.update(grads, carry[1], params)
            return (total, state), (sums, new_amax)

        begin = optax.tree.zeros_like(params), multi.init(params)
        (total, _), (sums, new_amax) = jax.lax.scan(
            add, begin, optax.microbatching.reshape_batch_axis(batch, rows)
        )
        sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)
        return sums, (total, jax.tree.map(lambda x: jnp.max(x, axis=0), new_amax))

    return summed


_WRAPPERS = {"microbatch": _microbatch, "multi_steps": _multi_steps}
