"""The head's loss, computed with its gradients for one chunk of tokens at a time.

No array of all logits ever exists. Each chunk adds to the loss and to both gradients in
the forward pass, so its logits are neither saved nor recomputed.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scaletrain import sharding
from scaletrain.config import PrecisionConfig
from scaletrain.kernels.cross_entropy import cross_entropy, supports

# Logits of a chunk on a device: 1 GiB in bfloat16, and as much for gradients, or 2 GiB
# where those take the place of the logits. Each chunk adds to the matrix's gradient,
# which is read and written for it: chunks of 16,384 tokens instead of 4,096 save 0.3%
# of a step of 1.1B on an H100.
LOGITS = 2**29


class LossSums(NamedTuple):
    """Sums over weighted tokens; divide by `weight` for a mean per token."""

    loss: Float[Array, ""]  # cross-entropy, nats
    z: Float[Array, ""]  # log(Z)^2
    weight: Float[Array, ""]  # tokens


@dataclasses.dataclass(frozen=True)
class Head:
    """The settings of the head: its matrix, its logits and its loss."""

    precision: PrecisionConfig
    vocab_first: bool = False  # the matrix is [V, D], an embedding's
    soft_cap: float = 0.0  # logits become cap * tanh(logits / cap); 0 = unlimited
    z_loss: float = 0.0  # weight of log(Z)^2 in the objective
    trained: bool = True  # the matrix gets a gradient

    @property
    def axes(self) -> tuple[str, str]:
        """Logical axes of the matrix."""
        return ("vocab", "embed") if self.vocab_first else ("embed", "vocab")

    @property
    def letters(self) -> str:
        """The einsum letters of the matrix."""
        return "vd" if self.vocab_first else "dv"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    w: Float[Array, "..."],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], LossSums]:
    """Returns the objective, summed over tokens, and the sums it is computed from.

    Only the objective has a gradient, with respect to `x_BTD` and `w`.

    Args:
      head: the head's settings.
      x_BTD: features, the head's input.
      w: [D, V], or [V, D] where `head.vocab_first`.
      targets_BT: the next token of each.
      weights_BT: 0 leaves a token out of every sum.

    Source: PaLM (arXiv 2204.02311) section 5 for the log(Z)^2 term.
    """
    return _sharded(head, False, x_BTD, w, targets_BT, weights_BT)[0]


def _forward(head, x_BTD, w, targets_BT, weights_BT):
    return _sharded(head, True, x_BTD, w, targets_BT, weights_BT)


def _backward(head, gradients, cotangents):
    scale, _ = cotangents
    dx_BTD, dw = ((scale * g).astype(g.dtype) for g in gradients)
    return dx_BTD, dw, None, None


head_loss.defvjp(_forward, _backward)


def _sharded(
    head: Head, learns: bool, x_BTD: Any, w: Any, targets_BT: Any, weights_BT: Any
) -> tuple[tuple[Any, LossSums], tuple[Any, Any]]:
    """Returns (objective, sums) and the gradients of `x_BTD` and `w`, by `_local`.

    It is a function of one device's shards, so that the matrix is gathered once, its
    gradient is summed once, and a vocabulary that is sharded needs collectives of only
    three numbers a token. Without `learns` the gradients are placeholders.
    """
    rows, embed = sharding.mesh_axes("batch", "tokens"), sharding.mesh_axes("embed")
    vocab = sharding.mesh_axes("vocab")
    local = functools.partial(_local, head, learns, rows, embed, vocab)
    x_spec, batch = (
        sharding.spec("batch", "tokens", "residual"),
        sharding.spec("batch", "tokens"),
    )
    gathered = sharding.spec(
        *(axis if axis == "vocab" else "replicated" for axis in head.axes)
    )
    dw_spec = sharding.spec(*head.axes) if learns and head.trained else gathered
    sums = jax.P()  # and the objective
    return sharding.by_device(
        local, (x_spec, gathered, batch, batch), (sums, (x_spec, dw_spec))
    )(x_BTD, w, targets_BT, weights_BT)


def _local(
    head: Head,
    learns: bool,
    rows: tuple[str, ...],
    embed: tuple[str, ...],
    vocab: tuple[str, ...],
    x_BTD: Float[Array, "B T D"],
    w: Float[Array, "..."],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[tuple[Any, LossSums], tuple[Any, Any]]:
    """Returns the results of `_sharded` for one device's rows and vocabulary."""
    B, T, D = x_BTD.shape
    reduce = head.precision.reduce
    V = w.shape[0 if head.vocab_first else 1]
    limit = 2 * LOGITS if learns and supports(reduce, vocab) else LOGITS
    fewest = -(-B * T * V // limit)
    # Chunks are equal: their number is the least divisor of the tokens that is enough.
    count = next(c for c in range(fewest, B * T + 1) if B * T % c == 0)
    w_low = w.astype(head.precision.compute)
    dw = jnp.zeros(w.shape if learns and head.trained else (), reduce)

    def chunk(carry, inputs):
        sums, dw = carry
        x_CD, targets_C, weights_C = inputs
        more, dx_CD, more_dw = _chunk(
            head, learns, vocab, w_low, x_CD, targets_C, weights_C
        )
        return (jax.tree.map(jnp.add, sums, more), dw + more_dw), dx_CD

    zero = jnp.zeros((), jnp.float32)  # the format of the weights of tokens
    chunks = (
        x_BTD.reshape(count, -1, D),
        targets_BT.reshape(count, -1),
        weights_BT.reshape(count, -1),
    )
    carry, dx = jax.lax.scan(chunk, (LossSums(zero, zero, zero), dw), chunks)
    sums, dw = carry
    sums = jax.tree.map(lambda s: jax.lax.psum(s, rows), sums) if rows else sums
    objective = sums.loss + head.z_loss * sums.z if head.z_loss else sums.loss
    if not learns:
        return (objective, sums), (x_BTD, w)
    dx_BTD = dx.reshape(B, T, D)
    if vocab:
        dx_BTD = jax.lax.psum(dx_BTD, vocab)
    if not head.trained:
        return (objective, sums), (dx_BTD, jnp.zeros_like(w))
    dim, dw = head.axes.index("embed"), dw.astype(head.precision.gradients)
    if others := tuple(axis for axis in rows if axis not in embed):
        dw = jax.lax.psum(dw, others)
    if embed:
        dw = jax.lax.psum_scatter(dw, embed, scatter_dimension=dim, tiled=True)
        # The TPU's compiler would move the addition of micro-batches before the
        # reduce-scatter, and fails where a conversion of the format lies between.
        dw = jax.lax.optimization_barrier(dw)
    return (objective, sums), (dx_BTD, dw.astype(w.dtype))


def _chunk(
    head: Head,
    learns: bool,
    vocab: tuple[str, ...],
    w: Float[Array, "..."],
    x_CD: Float[Array, "C D"],
    targets_C: Int[Array, " C"],
    weights_C: Float[Array, " C"],
) -> tuple[LossSums, Any, Any]:
    """Returns the sums of C tokens and their terms of both gradients."""
    logits_CV = jnp.einsum(f"cd,{head.letters}->cv", x_CD, w)
    if learns and supports(head.precision.reduce, vocab):
        log_z_C, picked_C, d_CV = cross_entropy(
            logits_CV,
            targets_C,
            weights_C,
            soft_cap=head.soft_cap,
            z_loss=head.z_loss,
        )
    else:
        log_z_C, picked_C, d_CV = _scored(head, vocab, logits_CV, targets_C, weights_C)
    sums = LossSums(
        loss=jnp.sum((log_z_C - picked_C) * weights_C),
        z=jnp.sum(jnp.square(log_z_C) * weights_C),
        weight=jnp.sum(weights_C),
    )
    if not learns:
        return sums, None, 0
    dx_CD = jnp.einsum(f"cv,{head.letters}->cd", d_CV, w)
    if not head.trained:
        return sums, dx_CD, 0
    dw = jnp.einsum(
        f"cd,cv->{head.letters}",
        x_CD,
        d_CV,
        preferred_element_type=head.precision.reduce,
    )
    return sums, dx_CD, dw


def _scored(
    head: Head,
    vocab: tuple[str, ...],
    logits_CV: Float[Array, "C V"],
    targets_C: Int[Array, " C"],
    weights_C: Float[Array, " C"],
) -> tuple[Float[Array, " C"], Float[Array, " C"], Float[Array, "C V"]]:
    """Returns the results of `cross_entropy`, for a vocabulary that may be sharded.

    They are log(Z), the logit of the target and the gradient of the logits.
    """
    dtype, logits_CV = logits_CV.dtype, logits_CV.astype(head.precision.reduce)
    derivative_CV = None
    if head.soft_cap:
        tanh_CV = jnp.tanh(logits_CV / head.soft_cap)
        logits_CV, derivative_CV = head.soft_cap * tanh_CV, 1 - jnp.square(tanh_CV)

    def over_vocab(reduced, collective):
        return collective(reduced, vocab) if vocab else reduced

    top_C = over_vocab(jnp.max(logits_CV, axis=-1), jax.lax.pmax)
    exp_CV = jnp.exp(logits_CV - top_C[:, None])
    log_z_C = top_C + jnp.log(over_vocab(jnp.sum(exp_CV, axis=-1), jax.lax.psum))
    V = logits_CV.shape[-1]
    first = jax.lax.axis_index(vocab) * V if vocab else 0
    # A comparison instead of a gather: it stays local when the vocabulary is split.
    hit_CV = (first + jnp.arange(V))[None, :] == targets_C[:, None]
    picked_C = jnp.sum(jnp.where(hit_CV, logits_CV, 0), axis=-1)
    picked_C = over_vocab(picked_C, jax.lax.psum)
    cotangent_C = (
        1 + 2 * head.z_loss * log_z_C if head.z_loss else jnp.ones_like(log_z_C)
    )
    d_CV = jnp.exp(logits_CV - log_z_C[:, None]) * cotangent_C[:, None] - hit_CV
    d_CV *= weights_C[:, None]
    if derivative_CV is not None:
        d_CV *= derivative_CV
    return log_z_C, picked_C, d_CV.astype(dtype)
