"""The head's loss: logits are made, used and dropped, a piece of the batch at a time.

No array of all logits ever exists. Each piece gives its part of the loss and of both
gradients at once, so nothing of it has to be kept or computed again.
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

# Values that a device makes at once: 1 GiB in bfloat16, and as much for gradients, or
# 2 GiB where those take the place of the logits. Each piece adds to the matrix's
# gradient, which is read and written for it: pieces of 16,384 tokens instead of 4,096
# are 0.3% of a step of 1.1B on an H100.
LOGITS = 2**29


class LossSums(NamedTuple):
    """Sums over weighted tokens; divide by `weight` for a mean per token."""

    loss: Float[Array, ""]  # cross-entropy, nats
    z: Float[Array, ""]  # log(Z)^2
    weight: Float[Array, ""]  # tokens


@dataclasses.dataclass(frozen=True)
class Head:
    """How features become a loss."""

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
        """The matrix's dims."""
        return "vd" if self.vocab_first else "dv"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def head_loss(
    head: Head,
    x_BTD: Float[Array, "B T D"],
    w: Float[Array, "..."],
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
) -> tuple[Float[Array, ""], LossSums]:
    """Returns the objective, summed over tokens, and the sums it is made of.

    The objective alone has a gradient, to `x_BTD` and `w`.

    Args:
      w: [D, V], or [V, D] where `head.vocab_first`.
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
    """Returns the loss and the gradients: every device works on what it holds.

    Written device by device, so that the matrix is gathered once, its gradient is
    summed once, and logits split over the vocabulary meet in three numbers a token.
    """
    rows, embed = sharding.mesh_axes("batch", "tokens"), sharding.mesh_axes("embed")
    vocab = sharding.mesh_axes("vocab")
    local = functools.partial(_local, head, learns, rows, embed, vocab)
    x_spec, batch = (
        sharding.spec("batch", "tokens", "residual"),
        sharding.spec("batch", "tokens"),
    )
    whole = sharding.spec(*(a if a == "vocab" else "norm" for a in head.axes))
    learned = sharding.spec(*head.axes) if learns and head.trained else whole
    sums = jax.P()  # and the objective
    return sharding.by_device(
        local, (x_spec, whole, batch, batch), (sums, (x_spec, learned))
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
    """Returns one device's part, summed over the devices that share it."""
    B, T, D = x_BTD.shape
    reduce = head.precision.reduce
    V = w.shape[0 if head.vocab_first else 1]
    at_once = 2 * LOGITS if learns and supports(reduce, vocab) else LOGITS
    fewest = -(-B * T * V // at_once)
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
        # The TPU's compiler fails where the parts of a batch are added to what it has
        # to convert first, for it would add before it scatters.
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
    """Returns the sums of C tokens and what they add to both gradients."""
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
    """Returns what `cross_entropy` does, of a vocabulary that may be cut."""
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
