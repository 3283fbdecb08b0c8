"""Attention by NVIDIA's library; its softmax is in float32.

Documents of a sequence are told to it by their places, so that what lies between two
of them is not computed. That takes memory by the document: batches with a sequence of
more than `DOCUMENTS`, and layers with a window, take a mask instead, in 1.7 times the
time of one long document. Which of the ways it is, the batch decides.

All ways together are one function with a gradient of its own: differentiated each for
itself, they would copy their output, which is also what their backward pass needs.
"""

import functools
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from scaletrain.models.attention.mask import visible
from scaletrain.models.attention.scores import Scores, on_local_heads

# Of a sequence, told by their places; the backward pass takes 0.5 GiB for each at
# 8 x 4096 tokens and 32 heads of 64.
DOCUMENTS = 8


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    q_segments_BT: Int[Array, "B T"],
    kv_segments_BS: Int[Array, "B S"],
    q_start: int | Int[Array, ""],
    local: bool | Bool[Array, ""],
    scores: Scores,
) -> Float[Array, "B T N H"]:
    """Returns attention by the library's kernels, on each device's own heads."""
    assert isinstance(q_start, int), "queries are the keys: there is no cache"

    def local_attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, local):
        T = q_BTNH.shape[1]
        window = jnp.where(local, scores.window or T, T)
        return attention(scores.scale, q_BTNH, k_BTKH, v_BTKH, segments_BT, window)

    return on_local_heads(local_attend, q_BTNH, k_BSKH, v_BSKH, q_segments_BT, local)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(
    scale: float,
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    window: Int[Array, ""],
) -> Float[Array, "B T N H"]:
    """Returns softmax(scores) v over earlier tokens of the same run of equal ids.

    Args:
      window: slots a query looks back on, itself included; T or more = all.
    """
    which, ways = _ways(scale, segments_BT, window)
    return jax.lax.switch(which, ways, q_BTNH, k_BTKH, v_BTKH)


def _forward(scale, q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    which, ways = _ways(scale, segments_BT, window)
    qkv = q_BTNH, k_BTKH, v_BTKH
    empty = [
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        for shapes in (jax.eval_shape(lambda w=w: _ran(w, qkv)[1]) for w in ways)
    ]

    def take(i):
        out_BTNH, kept, _ = _ran(ways[i], qkv)
        return out_BTNH, [*empty[:i], kept, *empty[i + 1 :]]

    taken = [functools.partial(take, i) for i in range(len(ways))]
    # What has this name is not made again where a layer is computed again.
    made = checkpoint_name(jax.lax.switch(which, taken), "attention")
    return made[0], (*qkv, segments_BT, window, made)


def _backward(scale, residuals, dout_BTNH):
    *qkv, segments_BT, window, (out_BTNH, kept) = residuals
    which, ways = _ways(scale, segments_BT, window)

    def pull(i):
        return _ran(ways[i], qkv)[2](out_BTNH, kept[i], dout_BTNH)

    pulls = [functools.partial(pull, i) for i in range(len(ways))]
    return (*jax.lax.switch(which, pulls), None, None)


attention.defvjp(_forward, _backward)


def _ran(way: Callable, qkv: Sequence[Array]) -> tuple[Array, list[Array], Callable]:
    """Returns a variant's output, its extra residuals and its gradient function.

    The gradient is a function of output, residuals and the output's gradient. Leaves of
    jax.vjp's closure that are q, k, v or the output themselves (by identity) are not
    residuals: kept twice, the switch would copy them. Should a jax version change that
    closure, this is slower but right.
    """
    out, pull = jax.vjp(way, *qkv)
    leaves, tree = jax.tree.flatten(pull)
    known = [*qkv, out]
    places = [[i for i, x in enumerate(known) if x is leaf] for leaf in leaves]
    kept = [leaf for leaf, at in zip(leaves, places, strict=True) if not at]

    def gradient(out: Array, kept: list[Array], dout: Array) -> tuple[Array, ...]:
        rest, known = iter(kept), [*qkv, out]
        filled = [known[at[0]] if at else next(rest) for at in places]
        return jax.tree.unflatten(tree, filled)(dout)

    return out, kept, gradient


def _ways(
    scale: float, segments_BT: Int[Array, "B T"], window: Int[Array, ""]
) -> tuple[Int[Array, ""], tuple[Callable, ...]]:
    """Returns functions of q, k and v, and which of them is the batch's."""
    causal = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        scale=scale,
        implementation="cudnn",
    )

    def packed(q_BTNH, k_BTKH, v_BTKH):
        return _packed(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale)

    # Computed again in the backward pass, so that its mask is not kept.
    @jax.checkpoint
    def masked(q_BTNH, k_BTKH, v_BTKH):
        mask_BTT = visible(segments_BT, segments_BT, 0, window)
        return causal(q_BTNH, k_BTKH, v_BTKH, mask=mask_BTT[:, None])

    most = jnp.max(jnp.sum(_begins(segments_BT), axis=1))
    which = (most > 1).astype(jnp.int32) + (most > DOCUMENTS)
    which = jnp.where(window < segments_BT.shape[1], 2, which)
    return which, (causal, packed if _takes_documents() else masked, masked)


def _begins(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns which tokens begin a document."""
    return jnp.diff(segments_BT, axis=1, prepend=segments_BT[:, :1] - 1) != 0


def _takes_documents() -> bool:
    """Whether the device's kernel takes several documents a sequence: from Hopper."""
    capability = getattr(jax.local_devices()[0], "compute_capability", "0")
    return float(capability) >= 9


def _packed(
    q_BTNH: Float[Array, "B T N H"],
    k_BTKH: Float[Array, "B T K H"],
    v_BTKH: Float[Array, "B T K H"],
    segments_BT: Int[Array, "B T"],
    scale: float,
) -> Float[Array, "B T N H"]:
    """Returns attention inside each of at most DOCUMENTS runs of equal ids."""
    # jax.nn has no argument for documents.
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    T, M = segments_BT.shape[1], DOCUMENTS
    find = functools.partial(jnp.nonzero, size=M + 1, fill_value=T)
    starts_BM = jax.vmap(lambda row_T: find(row_T)[0])(_begins(segments_BT)).astype(
        jnp.int32
    )
    lengths_BM = jnp.diff(starts_BM, axis=1)
    # What is not there is -1; the end of the last document is no start.
    lengths_BM = jnp.where(lengths_BM > 0, lengths_BM, -1)
    starts_BM = jnp.where(starts_BM < T, starts_BM, -1)
    out_BTNH = cudnn.dot_product_attention(
        q_BTNH,
        k_BTKH,
        v_BTKH,
        q_seqlen=lengths_BM,
        kv_seqlen=lengths_BM,
        q_offsets=starts_BM,
        kv_offsets=starts_BM,
        scale=scale,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        qkv_layout="BTNH",
    )
    return cast(jax.Array, out_BTNH)
