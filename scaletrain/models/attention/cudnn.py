"""Attention by NVIDIA's library; its softmax is in float32.

The library takes offsets and lengths of the documents of a sequence, and skips scores
between documents. Its memory grows with their number: batches with a sequence of more
than `DOCUMENTS`, and layers with a window, use a mask instead, in 1.7 times the time of
one long document. The batch decides which variant runs.

One function with its own gradient has all variants: were each differentiated by itself,
the switch would copy the output, which is a residual of the backward pass too.
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

# Most documents of a sequence that are passed by offset; the backward pass takes
# 0.5 GiB for each at 8 x 4096 tokens and 32 heads of 64.
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
    """Returns attention by the library's kernels, on the heads of each device.

    Args:
      q_segments_BT: document of each query; equal ids see each other.
      kv_segments_BS: document of each key.
      q_start: slot of the first query among the S slots.
      local: whether the layer looks through `scores.window`.
      scores: how scores are made.
    """
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
      scale: scores are multiplied by it.
      q_BTNH: queries.
      k_BTKH: keys.
      v_BTKH: values.
      segments_BT: document of each token.
      window: slots a query looks back on, itself included; T or more = all.
    """
    which, variants = _variants(scale, segments_BT, window)
    return jax.lax.switch(which, variants, q_BTNH, k_BTKH, v_BTKH)


def _forward(scale, q_BTNH, k_BTKH, v_BTKH, segments_BT, window):
    which, variants = _variants(scale, segments_BT, window)
    qkv = q_BTNH, k_BTKH, v_BTKH
    empty = [
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        for shapes in (
            jax.eval_shape(lambda v=v: _run_variant(v, qkv)[1]) for v in variants
        )
    ]

    def run(i):
        out_BTNH, extra, _ = _run_variant(variants[i], qkv)
        return out_BTNH, [*empty[:i], extra, *empty[i + 1 :]]

    runs = [functools.partial(run, i) for i in range(len(variants))]
    # By this name, remat can save the output and the residuals.
    results = checkpoint_name(jax.lax.switch(which, runs), "attention")
    return results[0], (*qkv, segments_BT, window, results)


def _backward(scale, residuals, dout_BTNH):
    *qkv, segments_BT, window, (out_BTNH, extra) = residuals
    which, variants = _variants(scale, segments_BT, window)

    def vjp(i):
        return _run_variant(variants[i], qkv)[2](out_BTNH, extra[i], dout_BTNH)

    vjps = [functools.partial(vjp, i) for i in range(len(variants))]
    return (*jax.lax.switch(which, vjps), None, None)


attention.defvjp(_forward, _backward)


def _run_variant(
    variant: Callable, qkv: Sequence[Array]
) -> tuple[Array, list[Array], Callable]:
    """Returns a variant's output, its extra residuals and its VJP.

    The VJP is a function of output, extra residuals and output gradient. Leaves of
    jax.vjp's closure that are q, k, v or the output themselves (by identity) are not
    residuals: kept twice, the switch would copy them. Should a jax version change that
    closure, this is slower but right.
    """
    out, vjp = jax.vjp(variant, *qkv)
    leaves, tree = jax.tree.flatten(vjp)
    known = [*qkv, out]
    # For each leaf the indices in `known` of the same array: one, or none.
    matches = [[i for i, x in enumerate(known) if x is leaf] for leaf in leaves]
    extra = [leaf for leaf, same in zip(leaves, matches, strict=True) if not same]

    def gradient(out: Array, extra: list[Array], dout: Array) -> tuple[Array, ...]:
        rest, known = iter(extra), [*qkv, out]
        filled = [known[same[0]] if same else next(rest) for same in matches]
        return jax.tree.unflatten(tree, filled)(dout)

    return out, extra, gradient


def _variants(
    scale: float, segments_BT: Int[Array, "B T"], window: Int[Array, ""]
) -> tuple[Int[Array, ""], tuple[Callable, ...]]:
    """Returns the index of the batch's variant, and all variants, functions of q, k, v.

    Args:
      scale: scores are multiplied by it.
      segments_BT: document of each token.
      window: slots a query looks back on, itself included; T or more = all.
    """
    causal = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        scale=scale,
        implementation="cudnn",
    )

    def packed(q_BTNH, k_BTKH, v_BTKH):
        return _packed(q_BTNH, k_BTKH, v_BTKH, segments_BT, scale)

    # Recomputed in the backward pass, so that its mask is no residual.
    @jax.checkpoint
    def masked(q_BTNH, k_BTKH, v_BTKH):
        mask_BTT = visible(segments_BT, segments_BT, 0, window)
        return causal(q_BTNH, k_BTKH, v_BTKH, mask=mask_BTT[:, None])

    most = jnp.max(jnp.sum(_begins(segments_BT), axis=1))
    which = (most > 1).astype(jnp.int32) + (most > DOCUMENTS)
    which = jnp.where(window < segments_BT.shape[1], 2, which)
    return which, (causal, packed if _takes_documents() else masked, masked)


def _begins(segments_BT: Int[Array, "B T"]) -> Bool[Array, "B T"]:
    """Returns a mask of the first tokens of documents."""
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
    # The library's sign for a missing document is -1; T, the end of the last document,
    # is no start.
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
