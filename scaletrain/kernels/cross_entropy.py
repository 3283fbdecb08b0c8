"""Cross-entropy of rows of logits on GPUs, its gradient in their place.

XLA reads logits three times, for the largest, for the sum and for the gradient, and
has that written beside them. Here a block reads its row twice, and writes over it. The
second time the row comes from the chip's cache, if that holds all rows under way.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from scaletrain import sharding

_BLOCK = 8192  # values that are taken at once


def supports(reduce: str, vocab_axes: Sequence[str]) -> bool:
    """Whether the mesh's devices run `cross_entropy`.

    Args:
      reduce: format of the sums, as `precision.reduce`.
      vocab_axes: mesh axes that split the vocabulary; a row must lie on one device.
    """
    return sharding.platform() == "gpu" and reduce == "float32" and not vocab_axes


def cross_entropy(
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, " C"],
    weights_C: Float[Array, " C"],
    *,
    soft_cap: float,
    z_loss: float,
    interpret: bool = False,
) -> tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, "C V"]]:
    """Returns log(Z), the target's logit, and the gradient of the weighted objective.

    That is sum((log(Z) - logit + z_loss * log(Z)^2) * weight), in float32 but for the
    gradient, which has the format of the logits and takes their memory.

    Args:
      soft_cap: logits are cap * tanh(logits / cap); 0 = unlimited.
    """
    C, V = logits_CV.shape
    block = min(_BLOCK, pl.next_power_of_2(V))
    sums = jax.ShapeDtypeStruct((C,), jnp.float32)
    grad = jax.ShapeDtypeStruct((C, V), logits_CV.dtype)
    return pl.pallas_call(
        functools.partial(_row, V, block, soft_cap, z_loss),
        grid=(C,),
        out_shape=(sums, sums, grad),
        input_output_aliases={0: 2},
        compiler_params=plgpu.CompilerParams(num_warps=max(1, min(16, block // 512))),
        interpret=interpret,
        name="cross_entropy",
    )(logits_CV, targets_C, weights_C)


def _row(
    V, block, soft_cap, z_loss,
    logits_ref, targets_ref, weights_ref, log_z_ref, picked_ref, grad_ref,
):  # fmt: skip
    """Takes one row, twice: `grad_ref` is where the logits lie."""
    row = pl.program_id(0)
    target = targets_ref[row]

    def read(i):
        """Returns a block's place, its logits, their slope and which is the target."""
        at = pl.ds(i * block, block)
        number = i * block + jnp.arange(block)
        inside = number < V
        x = plgpu.load(logits_ref.at[row, at], mask=inside, other=0.0)
        x, slope = x.astype(jnp.float32), 1.0
        if soft_cap:
            # e^2x overflows to infinity, and the quotient to 1.
            tanh = 1 - 2 / (1 + jnp.exp(2 / soft_cap * x))
            x, slope = soft_cap * tanh, 1 - tanh * tanh
        return at, inside, jnp.where(inside, x, -jnp.inf), slope, number == target

    def add(i, carry):
        top, total, picked = carry
        _, _, x, _, hit = read(i)
        higher = jnp.maximum(top, jnp.max(x))
        total = total * jnp.exp(top - higher) + jnp.sum(jnp.exp(x - higher))
        return higher, total, picked + jnp.sum(jnp.where(hit, x, 0.0))

    blocks = pl.cdiv(V, block)
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # -inf - -inf is not a number
    none = lowest, jnp.float32(0), jnp.float32(0)
    top, total, picked = jax.lax.fori_loop(0, blocks, add, none)
    log_z = top + jnp.log(total)
    log_z_ref[row], picked_ref[row] = log_z, picked
    weight, pull = weights_ref[row], 1 + 2 * z_loss * log_z

    def write(i, _):
        at, inside, x, slope, hit = read(i)
        grad = (jnp.exp(x - log_z) * pull - hit.astype(jnp.float32)) * weight * slope
        plgpu.store(grad_ref.at[row, at], grad.astype(grad_ref.dtype), mask=inside)

    jax.lax.fori_loop(0, blocks, write, None)
