"""Gemma 2 (arXiv 2408.00118): norms on both sides, soft caps, every other layer local.

Norms multiply by 1 + scale; embeddings are scaled by sqrt(d_model).
"""

from typing import Any

from scaletrain.hf.families import llama
from scaletrain.hf.families.mapping import Family, Key, Tensor
from scaletrain.hf.families.normalise import layer_types, nested_rope


def _number(value: float) -> int | float:
    """Returns `value` without the rounding error of its powers."""
    value = round(value, 6)
    return int(value) if value == int(value) else value


SCALE = Key(
    "query_pre_attn_scalar",
    "attention_scale",
    absent=256,
    to=lambda size: size**-0.5,
    fro=lambda scale: _number(scale**-2) if scale else None,
)
TIED = Key(
    "tie_word_embeddings", "head", absent=True, values={True: "tied", False: "untied"}
)
SHARED_KEYS = tuple(
    TIED if key.key == TIED.key else key
    for key in llama.KEYS
    if key not in llama.ROPE and key is not llama.HEAD_DIM
)
NORMS = tuple(
    Tensor(f"model.layers.{{l}}.{theirs}.weight", ((f"blocks/{ours}/scale", "d -> d"),))
    for theirs, ours in (
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "attention_out_norm"),
        ("pre_feedforward_layernorm", "mlp_norm"),
        ("post_feedforward_layernorm", "mlp_out_norm"),
    )
)
TENSORS = llama.OUTSIDE + llama.ATTENTION + llama.MLP + NORMS
IMPLIED = {
    "norm": "rms_plus_one",
    "norm_order": "both",
    "mlp": "geglu",
    "embed_scale": lambda c: c["hidden_size"] ** 0.5,
}
FIXED = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "use_bidirectional_attention": (False,),
}


def write_config(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the flat keys with the kind of every layer listed."""
    config = nested_rope(config)
    pattern = config.pop("sliding_pattern")
    kinds = layer_types(pattern, config["num_hidden_layers"])
    return config | {"sliding_window_pattern": pattern, "layer_types": kinds}


FAMILY = Family(
    name="gemma2",
    model_types=("gemma2",),
    architecture="Gemma2ForCausalLM",
    keys=(
        *SHARED_KEYS,
        *llama.ROPE,
        Key("head_dim", "d_head", absent=256),
        SCALE,
        Key("sliding_window", "sliding_window", absent=4096),
        Key("sliding_pattern", "global_every", absent=2),
        Key("attn_logit_softcapping", "attention_soft_cap", absent=50.0, null=0.0),
        Key("final_logit_softcapping", "logit_soft_cap", absent=30.0, null=0.0),
    ),
    tensors=TENSORS,
    implied=IMPLIED,
    fixed=FIXED,
    harmless=("hidden_act",),  # hidden_activation decides
    left_out=("*.rotary_emb.inv_freq",),
    write_config=write_config,
)
