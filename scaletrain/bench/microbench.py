"""How long an operation takes on a device, without what it takes to ask for it.

It is repeated inside one compiled loop, so that dispatching is not measured, and each
repetition reads one number of the one before, so that no compiler may leave it out.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaletrain.hardware import chips

REPEATS = 8  # inside a loop
_ROUNDS = 3  # of which the median counts
_AHEAD, _ENOUGH_S = 16, 0.05  # calls in a round: so many, or so long
_AGREED = 4  # calls in a round of several processes


def seconds(op: Callable, first: jax.Array, *rest: jax.Array) -> float:
    """Returns the seconds of `op(first, *rest)`; `first` is given away."""
    outs = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(op, first, *rest),
    )
    jitted = jax.jit(functools.partial(looped, op), donate_argnums=(0, 1))
    run = compiled(jitted, first, outs, *rest)
    return median(lambda carry: run(*carry, *rest), (first, outs)) / REPEATS


def looped(op: Callable, first: jax.Array, outs: Any, *rest: jax.Array) -> Any:
    """Applies `op` again and again, each time to what the last time changed."""

    def again(_, carry):
        first, _ = carry
        # Apart from `op`: in one kernel with it, all of `first` would be written anew.
        outs = jax.lax.optimization_barrier(op(first, *rest))
        corners = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(outs)]
        # Bounded, lest numbers grow from call to call.
        corner = jnp.tanh(sum(corner.astype("float32") for corner in corners))
        first = first.at[(0,) * first.ndim].set(corner.astype(first.dtype))
        return first, outs

    return jax.lax.fori_loop(0, REPEATS, again, (first, outs))


def median(call: Callable, carry: Any) -> float:
    """Returns the seconds of `call`, which takes and gives `carry`."""
    carry = jax.block_until_ready(call(carry))
    began = time.perf_counter()
    carry = jax.block_until_ready(call(carry))
    # Short calls follow each other without a wait, which would be measured with them.
    ahead = max(1, min(_AHEAD, int(_ENOUGH_S / (time.perf_counter() - began))))
    if jax.process_count() > 1:
        ahead = _AGREED  # clocks differ, and collectives need as many calls of each
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(ahead):
            carry = call(carry)
        jax.block_until_ready(carry)
        rounds.append((time.perf_counter() - began) / ahead)
    return float(np.median(rounds))


def compiled(jitted: Any, *args: Any) -> Any:
    """Returns `jitted` compiled with the options that the step is compiled with."""
    options = chips.compiler_options(kind())
    return jitted.lower(*args).compile(compiler_options=options)


def kind() -> str:
    """Returns what the devices are called."""
    return jax.local_devices()[0].device_kind
