"""Qwen2 and Qwen2.5 (arXiv 2407.10671, 2412.15115): Llama's layers, biased q, k, v."""

import dataclasses

from scaletrain.hf.families import llama
from scaletrain.hf.families.mapping import Tensor

BIASES = (
    Tensor(
        "model.layers.{l}.self_attn.q_proj.bias",
        (("blocks/attention/q/bias", "(n h) -> n h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.k_proj.bias",
        (("blocks/attention/k/bias", "(k h) -> k h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.v_proj.bias",
        (("blocks/attention/v/bias", "(k h) -> k h"),),
    ),
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="qwen2",
    model_types=("qwen2",),
    architecture="Qwen2ForCausalLM",
    tensors=llama.FAMILY.tensors + BIASES,
    implied={"bias": "qkv"},
    fixed={
        "hidden_act": ("silu",),
        "use_sliding_window": (False,),
        "sliding_pattern": (1,),
    },
    harmless=("sliding_window", "max_window_layers"),  # with use_sliding_window off
)
