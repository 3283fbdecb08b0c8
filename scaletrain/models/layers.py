"""The layers a decoder is made of. Each reads settings, never a model's name.

Matrices are stored in `precision.params`, multiplied in `precision.compute`; norms,
softmax and the sums of weight gradients run in `precision.reduce`.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, Key

from scaletrain.config import ModelConfig, PrecisionConfig
from scaletrain.models.attention import attend
from scaletrain.sharding import constrain, param


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(
    letters: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    precision: PrecisionConfig,
) -> Float[Array, "..."]:
    """Returns einsum(letters, x, w) in the compute precision.

    The gradient of `w` leaves its matmul in `precision.reduce`, so that it is summed
    over devices in that format; automatic differentiation would sum it in bfloat16.
    """
    return jnp.einsum(letters, x, w.astype(precision.compute))


def _project_forward(letters, x, w, precision):
    return project(letters, x, w, precision), (x, w)


def _project_backward(letters, precision, residuals, dy):
    x, w = residuals
    inputs, out = letters.split("->")
    x_dims, w_dims = inputs.split(",")
    dx = jnp.einsum(f"{out},{w_dims}->{x_dims}", dy, w.astype(precision.compute))
    dw = jnp.einsum(
        f"{x_dims},{out}->{w_dims}", x, dy, preferred_element_type=precision.reduce
    )
    return dx, dw.astype(w.dtype)


project.defvjp(_project_forward, _project_backward)


class Norm(nnx.Module):
    """RMSNorm (arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * scale."""

    def __init__(self, size: int, eps: float, precision: PrecisionConfig):
        self.scale = nnx.Param(jnp.ones(size, precision.params), logical=("norm",))
        self.eps = eps
        self.precision = precision

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        """Returns `x` normalised over its last dim, in the dtype of `x`."""
        wide = x.astype(self.precision.reduce)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(mean + self.eps)
        scale = self.scale[...].astype(wide.dtype)
        return (wide * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def biased(
    x: Float[Array, "..."], bias: nnx.Param | None, precision: PrecisionConfig
) -> Float[Array, "..."]:
    """Returns `x` plus the bias of its last dims, added in `precision.reduce`."""
    if bias is None:
        return x
    value = bias[...]
    value = value.reshape((1,) * (x.ndim - value.ndim) + value.shape)
    return (x.astype(precision.reduce) + value.astype(precision.reduce)).astype(x.dtype)


def rotate(
    x_BTNH: Float[Array, "B T N H"], positions_BT: Int[Array, "B T"], base: float
) -> Float[Array, "B T N H"]:
    """Returns `x` with rotary positions (arXiv 2104.09864 section 3.2).

    Dim i turns with dim i + H/2, the pairing of published Llama checkpoints. Angles
    are float32: bfloat16 cannot tell neighbouring positions apart past 256.
    """
    half = x_BTNH.shape[-1] // 2
    rates_H = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle_BT1H = positions_BT[:, :, None, None] * rates_H[None, None, None]
    sin, cos = jnp.sin(angle_BT1H), jnp.cos(angle_BT1H)
    one, two = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)


def dropped(
    x_BTD: Float[Array, "B T D"], keys_B: Key[Array, " B"] | None, rate: float
) -> Float[Array, "B T D"]:
    """Returns `x` with a share `rate` of its values zeroed and the rest scaled up.

    Each sequence has a key of its own, so the mask does not depend on how the batch
    is cut over devices or micro-batches.
    """
    if keys_B is None or rate == 0:
        return x_BTD
    draw = functools.partial(jax.random.bernoulli, p=1 - rate, shape=x_BTD.shape[1:])
    return jnp.where(jax.vmap(draw)(keys_B), x_BTD / (1 - rate), 0)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, key: jax.Array):
        D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.d_head
        keys, dtype = jax.random.split(key, 4), precision.params
        # Branch outputs shrink with depth (GPT-2, section 2.3).
        out_std = (2 * model.num_layers * N * H) ** -0.5
        self.wq = param(
            keys[0], (D, N, H), "embed", "heads", "head", std=D**-0.5, dtype=dtype
        )
        self.wk = param(
            keys[1], (D, K, H), "embed", "kv_heads", "head", std=D**-0.5, dtype=dtype
        )
        self.wv = param(
            keys[2], (D, K, H), "embed", "kv_heads", "head", std=D**-0.5, dtype=dtype
        )
        self.wo = param(
            keys[3], (N, H, D), "heads", "head", "embed", std=out_std, dtype=dtype
        )

        def zeros(shape, *axes, when):
            return (
                param(key, shape, *axes, std=0.0, dtype=dtype)
                if model.bias in when
                else None
            )

        self.bq = zeros((N, H), "heads", "head", when=("qkv", "all"))
        self.bk = zeros((K, H), "kv_heads", "head", when=("qkv", "all"))
        self.bv = zeros((K, H), "kv_heads", "head", when=("qkv", "all"))
        self.bo = zeros((D,), "norm", when=("all",))
        normed = model.qk_norm == "rms"
        self.q_norm = Norm(H, model.norm_eps, precision) if normed else None
        self.k_norm = Norm(H, model.norm_eps, precision) if normed else None
        self.model, self.precision = model, precision

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: tuple[Array, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Returns the attention branch and, with a cache, its keys and values.

        Args:
          cache: (k_BSKH, v_BSKH, kv_segments_BS, first slot to write), the segments
            already holding this call's tokens.
        """
        model, p = self.model, self.precision
        q_BTNH = biased(project("btd,dnh->btnh", x_BTD, self.wq[...], p), self.bq, p)
        k_BTKH = biased(project("btd,dkh->btkh", x_BTD, self.wk[...], p), self.bk, p)
        v_BTKH = biased(project("btd,dkh->btkh", x_BTD, self.wv[...], p), self.bv, p)
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH = rotate(q_BTNH, positions_BT, model.rope_base)
        k_BTKH = rotate(k_BTKH, positions_BT, model.rope_base)
        q_BTNH = checkpoint_name(
            constrain(q_BTNH, "batch", "tokens", "heads", "head"), "query"
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
            q_start=start,
            window=model.sliding_window,
            implementation=model.attention,
            reduce=p.reduce,
        )
        out_BTNH = checkpoint_name(out_BTNH, "attention")
        out_BTD = biased(
            project("btnh,nhd->btd", out_BTNH, self.wo[...], p), self.bo, p
        )
        return out_BTD, None if cache is None else (k_BSKH, v_BSKH)


_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}
_GATED = ("swiglu", "geglu")


class Mlp(nnx.Module):
    """The feed-forward branch: gated (arXiv 2002.05202) or plain."""

    def __init__(self, model: ModelConfig, precision: PrecisionConfig, key: jax.Array):
        D, F = model.d_model, model.d_ff
        keys, dtype = jax.random.split(key, 3), precision.params
        out_std = (2 * model.num_layers * F) ** -0.5
        self.w_gate = (
            param(keys[0], (D, F), "embed", "ff", std=D**-0.5, dtype=dtype)
            if model.mlp in _GATED
            else None
        )
        self.w_up = param(keys[1], (D, F), "embed", "ff", std=D**-0.5, dtype=dtype)
        self.w_down = param(keys[2], (F, D), "ff", "embed", std=out_std, dtype=dtype)
        biases = model.bias == "all"
        self.b_up = param(key, (F,), "ff", std=0.0, dtype=dtype) if biases else None
        self.b_down = param(key, (D,), "norm", std=0.0, dtype=dtype) if biases else None
        self.activation, self.precision = _ACTIVATIONS[model.mlp], precision

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the feed-forward branch."""
        p = self.precision
        up_BTF = biased(project("btd,df->btf", x_BTD, self.w_up[...], p), self.b_up, p)
        up_BTF = checkpoint_name(up_BTF, "mlp_up")
        if self.w_gate is None:
            hidden_BTF = self.activation(up_BTF)
        else:
            gate_BTF = project("btd,df->btf", x_BTD, self.w_gate[...], p)
            hidden_BTF = self.activation(checkpoint_name(gate_BTF, "mlp_gate")) * up_BTF
        return biased(
            project("btf,fd->btd", hidden_BTF, self.w_down[...], p), self.b_down, p
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    precision: PrecisionConfig,
) -> Float[Array, "B T D"]:
    """Returns the rows of `table_VD` in the compute precision.

    The gradient adds many rows into few; it does so in `precision.reduce`.
    """
    return table_VD.astype(precision.compute)[tokens_BT]


def _look_up_forward(table_VD, tokens_BT, precision):
    return look_up(table_VD, tokens_BT, precision), (table_VD, tokens_BT)


def _look_up_backward(precision, residuals, dy_BTD):
    table_VD, tokens_BT = residuals
    sums_VD = jnp.zeros(table_VD.shape, precision.reduce)
    sums_VD = sums_VD.at[tokens_BT].add(dy_BTD.astype(precision.reduce))
    return sums_VD.astype(table_VD.dtype), None


look_up.defvjp(_look_up_forward, _look_up_backward)
