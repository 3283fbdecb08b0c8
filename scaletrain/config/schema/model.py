"""The settings of the model."""

import dataclasses
from typing import Any

from scaletrain.config.setting import setting, unless, when
from scaletrain.matrices import GATED, REMAT_NAMES

_ROPE = when("model.positions", "rope")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and the way they are stretched."""

    base: float = setting(
        10_000.0,
        "Base of the rotary frequencies: pair i of a head turns by base^(-2i / "
        "d_head) radians a token.",
        least=1.0,
        used_when=_ROPE,
    )
    local_base: float = setting(
        0.0,
        "Base in the layers with a sliding window, which are then not stretched; 0 = "
        "as in the others.",
        least=0.0,
        used_when=(_ROPE, unless("model.sliding_window", 0)),
    )
    scaling: str = setting(
        "none",
        "Way in which frequencies are lowered for longer sequences: linear lowers all "
        "of them, llama3 the low ones; none = off.",
        choices=("none", "linear", "llama3"),
        used_when=_ROPE,
    )
    factor: float = setting(
        1.0,
        "Lowered frequencies are divided by this: times that sequences are longer "
        "than those of the first training; 1 = off.",
        least=1.0,
        used_when=when("model.rope.scaling", "linear", "llama3"),
    )
    low_freq: float = setting(
        1.0,
        "Turns in original_len tokens; frequencies with fewer are divided by factor.",
        least=0.0,
        used_when=when("model.rope.scaling", "llama3"),
    )
    high_freq: float = setting(
        4.0,
        "Turns in original_len tokens; frequencies with more stay, those between "
        "low_freq and this are divided in part.",
        least=0.0,
        used_when=when("model.rope.scaling", "llama3"),
    )
    original_len: int = setting(
        8192,
        "Tokens of a sequence in the first training.",
        least=1,
        used_when=when("model.rope.scaling", "llama3"),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer and the way its layers are executed."""

    num_layers: int = setting(4, "Number of layers.", least=1)
    d_model: int = setting(256, "Width of a token's vector between layers.", least=1)
    num_heads: int = setting(4, "Number of query heads.", least=1)
    num_kv_heads: int = setting(
        4, "Number of key and value heads; divides num_heads.", least=1
    )
    d_head: int = setting(
        64, "Width of a head; even, since rotary positions turn pairs.", least=2
    )
    d_ff: int = setting(1024, "Hidden units of the feed-forward layer.", least=1)
    vocab_size: int = setting(
        512, "Rows of the embedding table: the tokenizer's tokens or more.", least=2
    )
    mlp: str = setting(
        "swiglu",
        "Activation of the feed-forward layer; swiglu and geglu have a gate.",
        choices=(*GATED, "gelu", "relu2"),
    )
    head: str = setting(
        "untied",
        "Output matrix: one of its own (untied), or the embedding table (tied).",
        choices=("untied", "tied"),
    )
    bias: str = setting(
        "none",
        "Matrices with a bias: none, those of queries, keys and values (qkv), or all, "
        "and with norm=layer the norms.",
        choices=("none", "qkv", "all"),
    )
    norm: str = setting(
        "rms",
        "RMSNorm (rms), RMSNorm times 1 + scale (rms_plus_one), or LayerNorm (layer).",
        choices=("rms", "rms_plus_one", "layer"),
    )
    norm_order: str = setting(
        "pre",
        "Norms of attention and feed-forward layer: of the input (pre), of the output "
        "(post), or both.",
        choices=("pre", "post", "both"),
    )
    norm_eps: float = setting(
        1e-6, "Added to the mean square before its root is taken.", least=0.0
    )
    qk_norm: str = setting(
        "none",
        "Norm of queries and keys: over each head, or over all heads together; none = "
        "off.",
        choices=("none", "head", "all"),
    )
    positions: str = setting(
        "rope",
        "Rotary positions (rope), or a table of learned ones.",
        choices=("rope", "learned"),
    )
    max_positions: int = setting(
        0,
        "Tokens of the longest sequence: rows of the learned table, or the length "
        "that an export states; 0 = seq_len.",
        least=0,
    )
    rope: RopeConfig = RopeConfig()
    sliding_window: int = setting(
        0,
        "Newest tokens that a query sees, its own among them; 0 = all of its document.",
        least=0,
    )
    global_every: int = setting(
        0,
        "Each n-th layer has no sliding window; 0 = every layer has it.",
        least=0,
        used_when=unless("model.sliding_window", 0),
    )
    embed_scale: float = setting(
        1.0, "Embeddings are multiplied by this; 1 = off.", least=0.0
    )
    attention_scale: float = setting(
        0.0, "Attention scores are multiplied by this; 0 = d_head^-0.5.", least=0.0
    )
    attention_soft_cap: float = setting(
        0.0, "Attention scores become cap * tanh(score / cap); 0 = off.", least=0.0
    )
    logit_soft_cap: float = setting(
        0.0, "Logits become cap * tanh(logit / cap); 0 = off.", least=0.0
    )
    dropout: float = setting(
        0.0,
        "Share of the outputs of attention and feed-forward layer that training sets "
        "to 0; 0 = off.",
        least=0.0,
        most=0.95,
        exported=False,
    )
    layers: str = setting(
        "scan",
        "Compile one layer for all of them (scan), or each (unroll): that takes "
        "longer, and may run faster.",
        choices=("scan", "unroll"),
        resume="free",
        exported=False,
    )
    remat: str = setting(
        "none",
        "Values recomputed in the backward pass: none, all of a layer (full), all but "
        "products of matrices (dots), all but those that remat_save and remat_offload "
        "name (save), or as few as the memory has room for (auto).",
        choices=("none", "full", "dots", "save", "auto"),
        resume="free",
        exported=False,
    )
    remat_save: tuple[str, ...] = setting(
        (),
        f"Values that remat=save keeps on the device, of {', '.join(REMAT_NAMES)}.",
        used_when=when("model.remat", "save"),
        resume="free",
        exported=False,
    )
    remat_offload: tuple[str, ...] = setting(
        (),
        "Values that remat=save keeps in the host's memory; names as in remat_save.",
        used_when=when("model.remat", "save"),
        resume="free",
        exported=False,
    )
    attention: str = setting(
        "auto",
        "Implementation of attention: plain operations (xla), the TPU's kernel "
        "(splash), the GPU's library (cudnn), or the kernel of the devices if it can "
        "run these settings (auto).",
        choices=("auto", "xla", "splash", "cudnn"),
        resume="free",
        exported=False,
    )

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.mlp in GATED

    def is_local(self, layer: Any) -> Any:
        """Returns whether the layer of an index, also a traced one, has the window."""
        if not self.sliding_window or not self.global_every:
            return self.sliding_window > 0
        return (layer + 1) % self.global_every != 0
