"""Qwen3 (arXiv 2505.09388): Qwen2 with normalised queries and keys, no biases."""

import dataclasses

from scaletrain.hf.families import llama, qwen2
from scaletrain.hf.families.mapping import Key, Tensor

HEAD_NORMS = (
    Tensor(
        "model.layers.{l}.self_attn.q_norm.weight",
        (("blocks/attention/q_norm/scale", "h -> h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.k_norm.weight",
        (("blocks/attention/k_norm/scale", "h -> h"),),
    ),
)

FAMILY = dataclasses.replace(
    qwen2.FAMILY,
    name="qwen3",
    model_types=("qwen3",),
    architecture="Qwen3ForCausalLM",
    keys=tuple(
        Key("head_dim", "d_head", absent=128) if key is llama.HEAD_DIM else key
        for key in llama.KEYS
    ),
    tensors=llama.FAMILY.tensors + HEAD_NORMS,
    implied={"qk_norm": "head"},
    fixed={**qwen2.FAMILY.fixed, "attention_bias": (False,)},
)
