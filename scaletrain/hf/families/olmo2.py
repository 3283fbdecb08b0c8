"""OLMo 2 (arXiv 2501.00656): norms behind the branches, and over all of q and of k."""

import dataclasses

from scaletrain.hf.families import llama
from scaletrain.hf.families.mapping import Tensor

NORMS = (
    Tensor(
        "model.layers.{l}.post_attention_layernorm.weight",
        (("blocks/attention_out_norm/scale", "d -> d"),),
    ),
    Tensor(
        "model.layers.{l}.post_feedforward_layernorm.weight",
        (("blocks/mlp_out_norm/scale", "d -> d"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.q_norm.weight",
        (("blocks/attention/q_norm/scale", "(n h) -> n h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.k_norm.weight",
        (("blocks/attention/k_norm/scale", "(k h) -> k h"),),
    ),
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="olmo2",
    model_types=("olmo2",),
    architecture="Olmo2ForCausalLM",
    keys=tuple(
        dataclasses.replace(key, absent=1e-5) if key is llama.EPS else key
        for key in llama.KEYS
        if key is not llama.HEAD_DIM
    ),
    tensors=llama.OUTSIDE + llama.ATTENTION + llama.MLP + NORMS,
    implied={
        "d_head": llama.HEAD_DIM.absent,
        "qk_norm": "all",
        "norm_order": "post",
    },
    fixed={"hidden_act": ("silu",), "attention_bias": (False,)},
)
