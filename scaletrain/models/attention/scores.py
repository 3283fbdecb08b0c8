"""How scores are made of queries and keys, and on which device each is computed."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float, Int

from scaletrain import sharding


@dataclasses.dataclass(frozen=True)
class Scores:
    """How scores are made of queries and keys, and which of them count."""

    scale: float
    soft_cap: float = 0.0  # soft_cap * tanh(scores / soft_cap); 0 = off
    window: int = 0  # slots a local layer looks back on, itself included; 0 = all
    reduce: str = "float32"


def on_local_heads(
    kernel: Callable[..., Array],
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    local: bool | Bool[Array, ""],
) -> Float[Array, "B T N H"]:
    """Returns `kernel` of the sequences and heads that each device holds.

    XLA cannot partition a kernel's call by itself.
    """
    arguments = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads = sharding.spec("batch", "tokens", "heads", "head")
    kv_heads = sharding.spec("batch", "tokens", "kv_heads", "head")
    specs = (heads, kv_heads, kv_heads, sharding.spec("batch", "tokens"))
    if isinstance(local, bool):
        kernel = functools.partial(kernel, local=local)
    else:
        specs, arguments = (*specs, jax.P()), (*arguments, local)
    return sharding.by_device(kernel, specs, heads)(*arguments)
