"""The feed-forward branch."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from scaletrain.config import LoraConfig, ModelConfig, PrecisionConfig
from scaletrain.kernels import glu
from scaletrain.matrices import LAYER
from scaletrain.models.linear import Linear, fused_projections
from scaletrain.models.product import gathered, gradients
from scaletrain.sharding import constrain


class _Fused(NamedTuple):
    """The settings of `fused_mlp`, whose activation is computed inside its matmuls."""

    gate: glu.Gate
    precision: PrecisionConfig
    recompute: bool  # act(gate) * up, in the backward pass


Weights = tuple[Float[Array, "D F"], Float[Array, "D F"], Float[Array, "F D"]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fused_mlp(
    fused: _Fused, x_BTD: Float[Array, "B T D"], weights: Weights
) -> Float[Array, "B T D"]:
    """Returns the output of a gated `Mlp`, computed by the kernels of `glu`.

    Args:
      fused: static settings.
      x_BTD: the branch's input.
      weights: the matrices gate, up and down, as they are stored.
    """
    return _fused_forward(fused, x_BTD, weights)[0]


def _lowered(fused: _Fused, weights: Weights) -> tuple[Array, Array]:
    gate_DF, up_DF, down_FD = (w.astype(fused.precision.compute) for w in weights)
    return glu.interleaved(gate_DF, up_DF), down_FD


def _fused_forward(fused, x_BTD, weights):
    both_DG, down_FD = _lowered(fused, weights)
    gate_BTF, up_BTF, product_BTF = glu.forward(fused.gate, x_BTD, both_DG)
    gate_BTF = checkpoint_name(gate_BTF, "mlp_gate")
    up_BTF = checkpoint_name(up_BTF, "mlp_up")
    out_BTD = jnp.einsum("btf,fd->btd", product_BTF, down_FD)
    saved = gate_BTF, up_BTF, None if fused.recompute else product_BTF
    return out_BTD, (x_BTD, saved, weights, gathered(both_DG), gathered(down_FD))


def _fused_backward(fused, residuals, dout_BTD):
    x_BTD, (gate_BTF, up_BTF, product_BTF), weights, *lowered = residuals
    if lowered[0] is None:
        lowered = _lowered(fused, weights)
    both_DG, down_FD = lowered
    streams = dout_BTD, gate_BTF, up_BTF
    dboth_BTG, *recomputed = glu.backward(fused.gate, streams, down_FD, fused.recompute)
    product_BTF = recomputed[0] if fused.recompute else product_BTF
    p = fused.precision
    _, ddown_FD = gradients("btf,fd->btd", p, product_BTF, down_FD, dout_BTD)
    dx_BTD, dboth_DG = gradients("btd,df->btf", p, x_BTD, both_DG, dboth_BTG)
    dboth_DG = constrain(dboth_DG, "embed", "replicated", reduce_first=True)
    dws = (*glu.deinterleaved(dboth_DG), ddown_FD)
    return dx_BTD, tuple(dw.astype(w.dtype) for dw, w in zip(dws, weights, strict=True))


fused_mlp.defvjp(_fused_forward, _fused_backward)

_GATES = {"swiglu": glu.silu, "geglu": glu.gelu}

_ACTIVATIONS = {
    "swiglu": jax.nn.silu,
    "geglu": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Mlp(nnx.Module):
    """The feed-forward branch: gated (arXiv 2002.05202) or plain."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        lora: LoraConfig,
        key: jax.Array,
    ):
        D, F = model.d_model, model.d_ff
        keys = jax.random.split(key, 3)
        linear = functools.partial(
            Linear,
            model=model,
            precision=precision,
            lora=lora,
            bias=model.bias == "all",
        )
        self.gate = (
            linear(keys[0], LAYER["mlp/gate"], std=D**-0.5) if model.is_gated else None
        )
        self.up = linear(keys[1], LAYER["mlp/up"], std=D**-0.5)
        std = (2 * model.num_layers * F) ** -0.5
        self.down = linear(keys[2], LAYER["mlp/down"], std=std)
        self.activation = _ACTIVATIONS[model.mlp]
        self.model, self.precision = model, precision

    def __call__(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Returns the output of the feed-forward branch."""
        if self.gate is None:
            up_BTF = checkpoint_name(self.up(x_BTD), "mlp_up")
            return self.down(self.activation(up_BTF))
        linears = self.gate, self.up, self.down
        # The policy "dots" saves only the results of XLA's matmuls: in the backward
        # pass the kernels would run again.
        fused = self.model.remat != "dots" and glu.supports(
            x_BTD.shape, self.model.d_ff, self.precision.compute
        )
        if fused and all(linear.plain for linear in linears):
            return fused_mlp(
                self._fused(), x_BTD, tuple(each.weight[...] for each in linears)
            )
        gate_BTF, up_BTF = fused_projections(x_BTD, (self.gate, self.up))
        gate_BTF = checkpoint_name(gate_BTF, "mlp_gate")
        up_BTF = checkpoint_name(up_BTF, "mlp_up")
        return self.down(self.activation(gate_BTF) * up_BTF)

    def _fused(self) -> _Fused:
        saved = {*self.model.remat_save, *self.model.remat_offload}
        recompute = {"mlp_gate", "mlp_up"} <= saved
        return _Fused(_GATES[self.model.mlp], self.precision, recompute)
