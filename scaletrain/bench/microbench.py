"""The seconds of one operation on a device, without the time to dispatch it.

The operation is repeated inside one compiled loop, so that dispatching is not measured.
Each repetition reads one number of the previous result, so that the compiler cannot
remove any of them.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaletrain.hardware import chips

REPEATS = 8  # of the operation inside one loop
_ROUNDS = 3  # the result is their median
_MAX_CALLS, _ROUND_S = 16, 0.05  # limits of a round: number of calls, seconds
_SHARED_CALLS = 4  # calls in a round of several processes


def seconds(op: Callable, first: jax.Array, *rest: jax.Array) -> float:
    """Returns the seconds of `op(first, *rest)`.

    Args:
      op: takes arrays and returns any tree of arrays.
      first: argument that changes between repetitions; it is donated.
      rest: the other arguments.
    """
    outs = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(op, first, *rest),
    )
    jitted = jax.jit(functools.partial(looped, op), donate_argnums=(0, 1))
    run = compiled(jitted, first, outs, *rest)
    return median(lambda carry: run(*carry, *rest), (first, outs)) / REPEATS


def looped(op: Callable, first: jax.Array, outs: Any, *rest: jax.Array) -> Any:
    """Returns `first` and the result of `op` after the last of `REPEATS` repetitions.

    Args:
      op: takes arrays and returns any tree of arrays.
      first: argument of which each repetition changes one number.
      outs: initial value of the result, with its shapes.
      rest: the other arguments of `op`.
    """

    def repeat(_, carry):
        first, _ = carry
        # The barrier keeps the update out of the kernels of `op`: fused with them, it
        # would write all of `first` again.
        outs = jax.lax.optimization_barrier(op(first, *rest))
        corners = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(outs)]
        # Bounded, so that numbers do not grow from repetition to repetition.
        corner = jnp.tanh(sum(corner.astype("float32") for corner in corners))
        first = first.at[(0,) * first.ndim].set(corner.astype(first.dtype))
        return first, outs

    return jax.lax.fori_loop(0, REPEATS, repeat, (first, outs))


def median(call: Callable, carry: Any) -> float:
    """Returns the seconds of `call`, which maps `carry` to the next one."""
    carry = jax.block_until_ready(call(carry))  # warm-up
    began = time.perf_counter()
    carry = jax.block_until_ready(call(carry))
    # Short calls are dispatched ahead: a wait after each would be measured too.
    num_calls = max(1, min(_MAX_CALLS, int(_ROUND_S / (time.perf_counter() - began))))
    if jax.process_count() > 1:
        # Clocks differ, and a collective needs the same number of calls everywhere.
        num_calls = _SHARED_CALLS
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(num_calls):
            carry = call(carry)
        jax.block_until_ready(carry)
        rounds.append((time.perf_counter() - began) / num_calls)
    return float(np.median(rounds))


def compiled(jitted: Any, *args: Any) -> Any:
    """Returns `jitted` compiled for `args`, with the compiler options of the step."""
    options = chips.compiler_options(kind())
    return jitted.lower(*args).compile(compiler_options=options)


def kind() -> str:
    """Returns the name that jax has for the kind of the devices."""
    return jax.local_devices()[0].device_kind
