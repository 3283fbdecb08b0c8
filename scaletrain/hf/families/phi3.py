"""Phi-3 (arXiv 2404.14219): Llama's layers, stored with q, k, v and gate, up joined."""

import dataclasses

from scaletrain.hf.families import llama
from scaletrain.hf.families.mapping import Key, Tensor

JOINED = (
    Tensor(
        "model.layers.{l}.self_attn.qkv_proj.weight",
        (
            ("blocks/attention/q/weight", "(n h) d -> d n h"),
            ("blocks/attention/k/weight", "(k h) d -> d k h"),
            ("blocks/attention/v/weight", "(k h) d -> d k h"),
        ),
    ),
    Tensor(
        "model.layers.{l}.mlp.gate_up_proj.weight",
        (
            ("blocks/mlp/gate/weight", "f d -> d f"),
            ("blocks/mlp/up/weight", "f d -> d f"),
        ),
    ),
)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="phi3",
    model_types=("phi3",),
    architecture="Phi3ForCausalLM",
    keys=(
        *(
            dataclasses.replace(key, absent=1e-5) if key is llama.EPS else key
            for key in llama.KEYS
            if key is not llama.HEAD_DIM
        ),
        Key("sliding_window", "sliding_window", absent=0, null=0),
    ),
    tensors=(
        llama.OUTSIDE + llama.ATTENTION[3:] + llama.MLP[2:] + llama.PRE_NORMS + JOINED
    ),
    implied={"d_head": llama.HEAD_DIM.absent},
    fixed={
        "hidden_act": ("silu",),
        "attention_bias": (False,),
        "partial_rotary_factor": (1.0,),
        "sliding_pattern": (0,),
    },
    harmless=("original_max_position_embeddings",),  # read by a stretched rope alone
)
