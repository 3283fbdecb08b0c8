"""Cross-entropy of logits on GPUs; the gradient overwrites the logits.

XLA reads the logits three times (for the maximum, the sum and the gradient) and writes
the gradient to memory of its own. This kernel reads each row twice and writes the
gradient over it. The second read comes from the chip's cache, if the cache holds all
rows in progress.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float, Int

from scaletrain import sharding

_BLOCK = 8192  # logits that are read at once; longer rows take several blocks


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

    The objective is sum((log(Z) - logit + z_loss * log(Z)^2) * weight). The first two
    results are in float32; the gradient, with respect to the logits, has their format
    and overwrites them.

    Args:
      logits_CV: before `soft_cap`.
      targets_C: token ids.
      weights_C: of each row in the objective.
      soft_cap: the objective uses cap * tanh(logits / cap); 0 = unlimited.
      z_loss: weight of log(Z)^2.
      interpret: runs the kernel in Pallas' interpreter, for tests without a GPU.
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
    """Kernel of one row, in two passes; `grad_ref` is the memory of `logits_ref`."""
    row = pl.program_id(0)
    target = targets_ref[row]

    def read(i):
        """Returns the columns of a block, their mask and logits, d(soft cap), target.

        Logits beyond the vocabulary are -inf, so that they add nothing to any sum.
        """
        columns = pl.ds(i * block, block)
        token = i * block + jnp.arange(block)
        inside = token < V
        x = plgpu.load(logits_ref.at[row, columns], mask=inside, other=0.0)
        x, dcap = x.astype(jnp.float32), 1.0
        if soft_cap:
            # e^2x overflows to infinity, and the quotient to 1.
            tanh = 1 - 2 / (1 + jnp.exp(2 / soft_cap * x))
            x, dcap = soft_cap * tanh, 1 - tanh * tanh
        return columns, inside, jnp.where(inside, x, -jnp.inf), dcap, token == target

    def add(i, carry):
        # Online softmax: the sum is rescaled whenever the maximum grows, so that one
        # pass gives both (arXiv 1805.02867).
        maximum, total, picked = carry
        _, _, x, _, is_target = read(i)
        larger = jnp.maximum(maximum, jnp.max(x))
        total = total * jnp.exp(maximum - larger) + jnp.sum(jnp.exp(x - larger))
        return larger, total, picked + jnp.sum(jnp.where(is_target, x, 0.0))

    blocks = pl.cdiv(V, block)
    lowest = jnp.float32(jnp.finfo(jnp.float32).min)  # -inf - -inf is not a number
    initial = lowest, jnp.float32(0), jnp.float32(0)
    maximum, total, picked = jax.lax.fori_loop(0, blocks, add, initial)
    log_z = maximum + jnp.log(total)
    log_z_ref[row], picked_ref[row] = log_z, picked
    weight, dlog_z = weights_ref[row], 1 + 2 * z_loss * log_z

    def write(i, _):
        columns, inside, x, dcap, is_target = read(i)
        dx = jnp.exp(x - log_z) * dlog_z - is_target.astype(jnp.float32)
        grad = dx * weight * dcap
        plgpu.store(grad_ref.at[row, columns], grad.astype(grad_ref.dtype), mask=inside)

    jax.lax.fori_loop(0, blocks, write, None)
