"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, a tied head.

Its matrices are stored as (inputs, outputs), unlike those of every later family.
"""

from scaletrain.hf.families.mapping import Family, Key, Tensor

_LAYER = "transformer.h.{l}"


def _norm(theirs: str, ours: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{theirs}.weight", ((f"{ours}/scale", "d -> d"),)),
        Tensor(f"{theirs}.bias", ((f"{ours}/bias", "d -> d"),)),
    )


def _linear(theirs: str, ours: str, weight: str, bias: str) -> tuple[Tensor, ...]:
    return (
        Tensor(f"{_LAYER}.{theirs}.weight", ((f"blocks/{ours}/weight", weight),)),
        Tensor(f"{_LAYER}.{theirs}.bias", ((f"blocks/{ours}/bias", bias),)),
    )


FAMILY = Family(
    name="gpt2",
    model_types=("gpt2",),
    architecture="GPT2LMHeadModel",
    inputs_first=True,
    keys=(
        Key("n_layer", "num_layers"),
        Key("n_embd", "d_model"),
        Key("n_head", "num_heads"),
        Key("n_inner", "d_ff", absent=lambda c: 4 * c["n_embd"]),
        Key("vocab_size", "vocab_size"),
        Key("n_positions", "max_positions", absent=1024),
        Key("layer_norm_epsilon", "norm_eps", absent=1e-5),
        Key(
            "tie_word_embeddings",
            "head",
            absent=True,
            values={True: "tied", False: "untied"},
        ),
    ),
    tensors=(
        Tensor("transformer.wte.weight", (("embedding", "v d -> v d"),)),
        Tensor("transformer.wpe.weight", (("positions", "p d -> p d"),)),
        *_norm(f"{_LAYER}.ln_1", "blocks/attention_norm"),
        Tensor(
            f"{_LAYER}.attn.c_attn.weight",
            (
                ("blocks/attention/q/weight", "d (n h) -> d n h"),
                ("blocks/attention/k/weight", "d (k h) -> d k h"),
                ("blocks/attention/v/weight", "d (k h) -> d k h"),
            ),
            dim=1,
        ),
        Tensor(
            f"{_LAYER}.attn.c_attn.bias",
            (
                ("blocks/attention/q/bias", "(n h) -> n h"),
                ("blocks/attention/k/bias", "(k h) -> k h"),
                ("blocks/attention/v/bias", "(k h) -> k h"),
            ),
        ),
        *_linear("attn.c_proj", "attention/o", "(n h) d -> n h d", "d -> d"),
        *_norm(f"{_LAYER}.ln_2", "blocks/mlp_norm"),
        *_linear("mlp.c_fc", "mlp/up", "d f -> d f", "f -> f"),
        *_linear("mlp.c_proj", "mlp/down", "f d -> f d", "d -> d"),
        *_norm("transformer.ln_f", "norm"),
        Tensor("lm_head.weight", (("head/weight", "v d -> d v"),)),
    ),
    implied={
        "num_kv_heads": lambda c: c["n_head"],
        "d_head": lambda c: c["n_embd"] // c["n_head"],
        "mlp": "gelu",
        "bias": "all",
        "norm": "layer",
        "positions": "learned",
    },
    fixed={
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
    harmless=(
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ),
    also={"": "transformer."},
    # Causal masks that older files carry along.
    left_out=("transformer.h.*.attn.bias", "transformer.h.*.attn.masked_bias"),
)
