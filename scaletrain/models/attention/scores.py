"""The settings of attention scores, and kernels run on the heads of each device."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Bool, Float, Int

from scaletrain import sharding


@dataclasses.dataclass(frozen=True)
class Scores:
    """The settings of attention scores: scale, cap, window and format."""

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
    """Returns the output of `kernel`, run on the sequences and heads of each device.

    XLA cannot partition a kernel's call by itself.

    Args:
      kernel: a function of the five other arguments, of one device's shards.
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: document of each token.
      local: whether the layer looks through the sliding window.
    """
    arguments = (q_BTNH, k_BTKH, v_BTKH, segments_BT)
    heads = sharding.spec("batch", "tokens", "heads", "head_dim")
    kv_heads = sharding.spec("batch", "tokens", "kv_heads", "head_dim")
    specs = (heads, kv_heads, kv_heads, sharding.spec("batch", "tokens"))
    if isinstance(local, bool):
        kernel = functools.partial(kernel, local=local)
    else:
        specs, arguments = (*specs, jax.P()), (*arguments, local)
    return sharding.by_device(kernel, specs, heads)(*arguments)
