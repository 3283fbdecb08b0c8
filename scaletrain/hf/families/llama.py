"""Llama 2 and 3.x (arXiv 2307.09288, 2407.21783), and what later families kept."""

from scaletrain.hf.families.mapping import Family, Key, Tensor
from scaletrain.hf.families.normalise import nested_rope

HEAD_DIM = Key(
    "head_dim",
    "d_head",
    absent=lambda c: c["hidden_size"] // c["num_attention_heads"],
)
ROPE = (
    Key("rope_theta", "rope.base", absent=10_000.0),
    Key(
        "rope_scaling.rope_type",
        "rope.scaling",
        absent="default",
        values={"default": "none", "linear": "linear", "llama3": "llama3"},
    ),
    Key("rope_scaling.factor", "rope.factor", absent=1.0),
    Key("rope_scaling.low_freq_factor", "rope.low_freq", absent=1.0),
    Key("rope_scaling.high_freq_factor", "rope.high_freq", absent=4.0),
    Key(
        "rope_scaling.original_max_position_embeddings",
        "rope.original_len",
        absent=8192,
    ),
)
EPS = Key("rms_norm_eps", "norm_eps", absent=1e-6)
KEYS = (
    Key("num_hidden_layers", "num_layers"),
    Key("hidden_size", "d_model"),
    Key("num_attention_heads", "num_heads"),
    Key(
        "num_key_value_heads",
        "num_kv_heads",
        absent=lambda c: c["num_attention_heads"],
    ),
    HEAD_DIM,
    Key("intermediate_size", "d_ff"),
    Key("vocab_size", "vocab_size"),
    Key("max_position_embeddings", "max_positions", absent=2048),
    EPS,
    Key(
        "tie_word_embeddings",
        "head",
        absent=False,
        values={False: "untied", True: "tied"},
    ),
    *ROPE,
)

OUTSIDE = (
    Tensor("model.embed_tokens.weight", (("embedding", "v d -> v d"),)),
    Tensor("model.norm.weight", (("norm/scale", "d -> d"),)),
    Tensor("lm_head.weight", (("head/weight", "v d -> d v"),)),
)
ATTENTION = (
    Tensor(
        "model.layers.{l}.self_attn.q_proj.weight",
        (("blocks/attention/q/weight", "(n h) d -> d n h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.k_proj.weight",
        (("blocks/attention/k/weight", "(k h) d -> d k h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.v_proj.weight",
        (("blocks/attention/v/weight", "(k h) d -> d k h"),),
    ),
    Tensor(
        "model.layers.{l}.self_attn.o_proj.weight",
        (("blocks/attention/o/weight", "d (n h) -> n h d"),),
    ),
)
MLP = (
    Tensor(
        "model.layers.{l}.mlp.gate_proj.weight",
        (("blocks/mlp/gate/weight", "f d -> d f"),),
    ),
    Tensor(
        "model.layers.{l}.mlp.up_proj.weight",
        (("blocks/mlp/up/weight", "f d -> d f"),),
    ),
    Tensor(
        "model.layers.{l}.mlp.down_proj.weight",
        (("blocks/mlp/down/weight", "d f -> f d"),),
    ),
)
PRE_NORMS = (
    Tensor(
        "model.layers.{l}.input_layernorm.weight",
        (("blocks/attention_norm/scale", "d -> d"),),
    ),
    Tensor(
        "model.layers.{l}.post_attention_layernorm.weight",
        (("blocks/mlp_norm/scale", "d -> d"),),
    ),
)

FAMILY = Family(
    name="llama",
    model_types=("llama",),
    architecture="LlamaForCausalLM",
    keys=KEYS,
    tensors=OUTSIDE + ATTENTION + MLP + PRE_NORMS,
    fixed={"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)},
    left_out=("*.rotary_emb.inv_freq",),
    write_config=nested_rope,
)
