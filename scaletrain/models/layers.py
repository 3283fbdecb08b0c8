"""Parts of a decoder's layer: norms, rotary positions, dropout and attention.

Each reads settings, never a model's name. Matrices are those of `linear`; norms and
softmax run in `precision.reduce`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from scaletrain.config import LoraConfig, ModelConfig, PrecisionConfig, RopeConfig
from scaletrain.kernels import norm as norm_kernel
from scaletrain.kernels import rotary as rotary_kernel
from scaletrain.matrices import LAYER
from scaletrain.models.attention import Scores, attend
from scaletrain.models.linear import Linear, fused_projections
from scaletrain.models.product import project_all
from scaletrain.sharding import constrain


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467) or LayerNorm (arXiv 1607.06450) of the last dims.

    "rms_plus_one" multiplies by 1 + scale, so that decaying the scale decays to 1.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        model: ModelConfig,
        precision: PrecisionConfig,
        axes: tuple[str, ...] = ("norm",),
    ):
        first = jnp.zeros if model.norm == "rms_plus_one" else jnp.ones
        self.scale = nnx.Param(first(shape, precision.params), logical=axes)
        centred = model.norm == "layer"
        self.bias = (
            nnx.Param(jnp.zeros(shape, precision.params), logical=axes)
            if centred and model.bias == "all"
            else None
        )
        self.offset = 1 if model.norm == "rms_plus_one" else 0
        self.centred, self.eps, self.precision = centred, model.norm_eps, precision

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns `x` normalised over the dims of the scale, in the dtype of `x`."""
        wide = x.astype(self.precision.reduce)
        scale = self.scale[...].astype(wide.dtype)
        dims = tuple(range(-scale.ndim, 0))
        lead = (1,) * (x.ndim - scale.ndim)
        if self.centred:
            wide -= jnp.mean(wide, axis=dims, keepdims=True)
        mean = jnp.mean(jnp.square(wide), axis=dims, keepdims=True)
        wide *= jax.lax.rsqrt(mean + self.eps)
        wide *= (self.offset + scale).reshape(lead + scale.shape)
        if self.bias is not None:
            wide += self.bias[...].astype(wide.dtype).reshape(lead + scale.shape)
        return wide.astype(x.dtype)

    def added(
        self, x_BTD: Float[Array, "B T D"], branch_BTD: Float[Array, "B T D"] | None
    ) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
        """Returns `x` plus a branch (None = 0), and that sum normalised."""
        reduce = self.precision.reduce
        if not self.centred and norm_kernel.supports(x_BTD.shape, reduce):
            scale_D = self.offset + self.scale[...].astype(jnp.float32)
            return norm_kernel.add_norm(x_BTD, branch_BTD, scale_D, self.eps)
        if branch_BTD is not None:
            x_BTD += branch_BTD
        return x_BTD, self(x_BTD)


def rotary_rates(
    rope: RopeConfig, d_head: int, *, local: bool = False
) -> Float[Array, " P"]:
    """Returns the radians per position by which each pair of dims is rotated.

    "linear" divides every rate by `factor` (arXiv 2306.15595); "llama3" divides
    rates of fewer than `low_freq` rotations in `original_len` tokens, keeps rates of
    more than `high_freq`, and interpolates between them (the rule published with the
    Llama 3.1 weights). Local layers keep every rate.

    Args:
      rope: base and scaling.
      d_head: dims of a head, twice the pairs P.
      local: whether the layer looks through the sliding window.
    """
    half = d_head // 2
    base = rope.local_base if local and rope.local_base else rope.base
    rates_P = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if rope.scaling == "none" or (local and rope.local_base):
        return rates_P
    if rope.scaling == "linear":
        return rates_P / rope.factor
    rotations_P = rope.original_len * rates_P / (2 * jnp.pi)
    share_P = (rotations_P - rope.low_freq) / (rope.high_freq - rope.low_freq)
    share_P = jnp.clip(share_P, 0, 1)  # of the rate that is kept undivided
    return rates_P * (share_P + (1 - share_P) / rope.factor)


def rotate(
    x_BTNH: Float[Array, "B T N H"],
    positions_BT: Int[Array, "B T"],
    rates_P: Float[Array, " P"],
) -> Float[Array, "B T N H"]:
    """Returns `x` with rotary positions (arXiv 2104.09864 section 3.2).

    Dims i and i + H/2 are a pair, as in published Llama checkpoints. Angles are
    float32: bfloat16 cannot tell neighbouring positions apart past 256.

    Args:
      x_BTNH: queries or keys.
      positions_BT: position of each token in its document.
      rates_P: see `rotary_rates`; P = H/2.
    """
    sin, cos = (each[:, :, None] for each in _angles(positions_BT, rates_P))
    one, two = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return rotated.astype(x_BTNH.dtype)


def _angles(
    positions_BT: Int[Array, "B T"], rates_P: Float[Array, " P"]
) -> tuple[Float[Array, "B T P"], Float[Array, "B T P"]]:
    """Returns sine and cosine of the angles of rotation."""
    angle_BTP = positions_BT[:, :, None] * rates_P[None, None]
    return jnp.sin(angle_BTP), jnp.cos(angle_BTP)


def dropout(
    x_BTD: Float[Array, "B T D"], keys_B: Key[Array, " B"] | None, rate: float
) -> Float[Array, "B T D"]:
    """Returns `x` with a share `rate` of its values zeroed and the rest scaled up.

    Each sequence has a key of its own, so the mask does not depend on how the batch
    is split over devices and micro-batches.

    Args:
      x_BTD: a branch's output.
      keys_B: a random key for each sequence; None = no dropout.
      rate: probability of a zero.
    """
    if keys_B is None or rate == 0:
        return x_BTD
    draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x_BTD.shape[1:])
    return jnp.where(jax.vmap(draw)(keys_B), x_BTD / (1 - rate), 0)


def _head_norm(
    model: ModelConfig, precision: PrecisionConfig, heads: int, axis: str
) -> Norm | None:
    """Returns the norm of queries or keys (of each head or of all), None without.

    Args:
      model: `qk_norm` chooses.
      precision: formats.
      heads: number of heads, N or K.
      axis: the logical axis of the heads.
    """
    if model.qk_norm == "none":
        return None
    if model.qk_norm == "head":
        return Norm((model.d_head,), model, precision)
    return Norm((heads, model.d_head), model, precision, (axis, "head_dim"))


class Attention(nnx.Module):
    """Grouped-query self-attention."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        lora: LoraConfig,
        key: jax.Array,
    ):
        D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.d_head
        keys = jax.random.split(key, 4)
        linear = functools.partial(Linear, model=model, precision=precision, lora=lora)
        ins = {"std": D**-0.5, "bias": model.bias in ("qkv", "all")}
        self.q = linear(keys[0], LAYER["attention/q"], **ins)
        self.k = linear(keys[1], LAYER["attention/k"], **ins)
        self.v = linear(keys[2], LAYER["attention/v"], **ins)
        # Branch outputs shrink with depth (GPT-2, section 2.3).
        std = (2 * model.num_layers * N * H) ** -0.5
        bias = model.bias == "all"
        self.o = linear(keys[3], LAYER["attention/o"], std=std, bias=bias)
        self.q_norm = _head_norm(model, precision, N, "heads")
        self.k_norm = _head_norm(model, precision, K, "kv_heads")
        self.model, self.precision = model, precision

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        local: bool | Bool[Array, ""],
        cache: tuple[Array, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Returns the attention branch and, with a cache, its keys and values.

        Args:
          local: whether this layer looks through the sliding window.
          cache: (k_BSKH, v_BSKH, kv_segments_BS, first slot to write), the segments
            already holding this call's tokens.
        """
        model = self.model
        q_BTNH, k_BTKH, v_BTKH = self._heads(x_BTD, positions_BT, local)
        q_BTNH = checkpoint_name(
            constrain(q_BTNH, "batch", "tokens", "heads", "head_dim"), "query"
        )
        k_BTKH = checkpoint_name(k_BTKH, "key")
        v_BTKH = checkpoint_name(v_BTKH, "value")
        if cache is None:
            k_BSKH, v_BSKH, kv_segments_BS, start = k_BTKH, v_BTKH, segments_BT, 0
        else:
            k_BSKH, v_BSKH, kv_segments_BS, start = cache
            k_BSKH = jax.lax.dynamic_update_slice_in_dim(k_BSKH, k_BTKH, start, 1)
            v_BSKH = jax.lax.dynamic_update_slice_in_dim(v_BSKH, v_BTKH, start, 1)
        out_BTNH = attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segments_BT=segments_BT,
            kv_segments_BS=kv_segments_BS,
            scores=Scores(
                scale=model.attention_scale or model.d_head**-0.5,
                soft_cap=model.attention_soft_cap,
                window=model.sliding_window,
                reduce=self.precision.reduce,
            ),
            q_start=start,
            local=local,
            implementation=model.attention if cache is None else "xla",
        )
        return self.o(out_BTNH), None if cache is None else (k_BSKH, v_BSKH)

    def _heads(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        local: bool | Bool[Array, ""],
    ) -> rotary_kernel.Parts:
        """Returns queries, keys and values, with their positions."""
        model, linears = self.model, (self.q, self.k, self.v)
        rope = model.positions == "rope"
        # Nothing may come between the matmul and the positions.
        fused = rope and self.q_norm is None and all(each.plain for each in linears)
        if fused and rotary_kernel.supports(x_BTD.shape):
            ws = tuple(each.weight[...].reshape(x_BTD.shape[2], -1) for each in linears)
            sin_BTP, cos_BTP = _angles(positions_BT, self._rates(local))
            heads = rotary_kernel.Heads(
                model.num_heads, model.num_kv_heads, model.d_head
            )
            heads_BTF = project_all(x_BTD, ws, self.precision)
            return rotary_kernel.split_rotated(heads_BTF, sin_BTP, cos_BTP, heads)
        q_BTNH, k_BTKH, v_BTKH = fused_projections(x_BTD, linears)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if rope:
            rates_P = self._rates(local)
            q_BTNH = rotate(q_BTNH, positions_BT, rates_P)
            k_BTKH = rotate(k_BTKH, positions_BT, rates_P)
        return q_BTNH, k_BTKH, v_BTKH

    def _rates(self, local: bool | Bool[Array, ""]) -> Float[Array, " P"]:
        rope, H = self.model.rope, self.model.d_head
        if not rope.local_base:
            return rotary_rates(rope, H)
        return jnp.where(
            local, rotary_rates(rope, H, local=True), rotary_rates(rope, H)
        )
