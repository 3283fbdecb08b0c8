"""Gemma 3 (arXiv 2503.19786): five local layers to a global one, two rope bases.

Of the sizes that also see pictures, the language model alone is read.
"""

import dataclasses

from scaletrain.hf.families import gemma2, llama, qwen3
from scaletrain.hf.families.mapping import Key

# Defaults of keys that the config.json of the larger sizes leave out.
_ABSENT = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 262_208,
    "max_position_embeddings": 131_072,
}
_ROPE = (
    Key("rope_theta", "rope.base", absent=1_000_000.0),
    Key("rope_local_base_freq", "rope.local_base", absent=10_000.0),
    *llama.ROPE[1:],
)

FAMILY = dataclasses.replace(
    gemma2.FAMILY,
    name="gemma3",
    model_types=("gemma3_text", "gemma3"),
    architecture="Gemma3ForCausalLM",
    keys=(
        *(
            dataclasses.replace(key, absent=_ABSENT.get(key.key, key.absent))
            for key in gemma2.SHARED_KEYS
        ),
        *_ROPE,
        Key("head_dim", "d_head", absent=256),
        gemma2.SCALE,
        Key("sliding_window", "sliding_window", absent=4096),
        Key("sliding_pattern", "global_every", absent=6),
    ),
    tensors=gemma2.TENSORS + qwen3.HEAD_NORMS,
    implied={**gemma2.IMPLIED, "qk_norm": "head"},
    fixed={
        **gemma2.FIXED,
        "attn_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
    },
    also={
        "language_model.model.": "model.",
        "language_model.lm_head.": "lm_head.",
        "model.language_model.": "model.",
    },
    left_out=(
        *gemma2.FAMILY.left_out,
        "*vision_tower.*",
        "*multi_modal_projector.*",
    ),
)
