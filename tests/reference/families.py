"""Tiny random models of each family, made and run by transformers in torch.

The one file that imports torch: what makes the committed fixtures, what makes the
models of `parity.py` and what reads an export back all share it. `Shape()` is the
fixtures' shape, `Shape.draw` a random one.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

EOS = 2
MAX_POSITION = 128
NUM_GREEDY = 32
MARGIN = 2e-3  # between the best two logits of a greedy step, well above rounding
NUM_PROMPTS = 8  # tried, for the least repetitive continuation

torch.set_num_threads(1)  # the models are too small to share


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and numbers that decide what a model computes."""

    vocab: int = 96
    hidden: int = 32  # a multiple of the heads, which some configs insist on
    kv_heads: int = 2
    groups: int = 2  # query heads of one kv head
    head_dim: int = 12  # where the family may choose; not hidden / heads
    intermediate: int = 88  # not a multiple of hidden
    layers: int = 3
    window: int = 16
    pattern_tail: int = 2  # layers after the last full pattern
    theta: float = 500.0
    norm_eps: float = 3e-3  # far above the usual, so that it shows
    tied: bool = True
    dtype: str = "float32"

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Shape":
        """Returns shapes that keep every oddity of the default ones."""
        kv_heads, groups = int(rng.integers(1, 4)), int(rng.integers(2, 4))
        narrow = 2 * int(rng.integers(3, 7))
        hidden = kv_heads * groups * narrow
        return cls(
            vocab=int(rng.integers(70, 130)),
            hidden=hidden,
            kv_heads=kv_heads,
            groups=groups,
            head_dim=narrow + 2 * int(rng.choice([-1, 1, 2])),
            intermediate=hidden + int(rng.integers(1, hidden)),
            layers=int(rng.integers(2, 5)),
            window=int(rng.integers(5, 30)),
            pattern_tail=int(rng.integers(1, 3)),
            theta=float(rng.integers(200, 20_000)),
            norm_eps=float(rng.choice([1e-3, 3e-3, 1e-2])),
            tied=bool(rng.integers(2)),
            dtype=str(rng.choice(["float32", "bfloat16"])),
        )

    @property
    def heads(self) -> int:
        """Number of query heads."""
        return self.kv_heads * self.groups


def _common(shape: Shape, **changes: Any) -> dict[str, Any]:
    """Returns what most families' configs name alike."""
    return {
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": MAX_POSITION,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.theta},
        "rms_norm_eps": shape.norm_eps,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        **changes,
    }


def llama(shape: Shape) -> PretrainedConfig:
    """Llama 2: every head has its own keys and values, nothing is scaled or tied."""
    return transformers.LlamaConfig(**_common(shape, num_key_value_heads=shape.heads))


def llama3(shape: Shape) -> PretrainedConfig:
    """Llama 3: positions scaled beyond a short original range, grouped heads."""
    scaled = {
        "rope_type": "llama3",
        "rope_theta": shape.theta,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    return transformers.LlamaConfig(
        **_common(
            shape,
            head_dim=shape.head_dim,
            max_position_embeddings=8 * 32,
            rope_parameters=scaled,
            tie_word_embeddings=shape.tied,
        )
    )


def mistral(shape: Shape) -> PretrainedConfig:
    """Mistral: every layer has a sliding window."""
    return transformers.MistralConfig(
        **_common(shape, head_dim=shape.head_dim, sliding_window=shape.window)
    )


def qwen2(shape: Shape) -> PretrainedConfig:
    """Qwen 2: biases on queries, keys and values alone."""
    return transformers.Qwen2Config(**_common(shape, tie_word_embeddings=shape.tied))


def qwen3(shape: Shape) -> PretrainedConfig:
    """Qwen 3: queries and keys normalised per head, heads wider than the model."""
    return transformers.Qwen3Config(
        **_common(shape, head_dim=shape.head_dim, tie_word_embeddings=not shape.tied)
    )


def gemma2(shape: Shape) -> PretrainedConfig:
    """Gemma 2: a window on every other layer, both soft caps where they bite."""
    return transformers.Gemma2Config(
        **_common(
            shape,
            num_hidden_layers=4,
            head_dim=shape.head_dim,
            pad_token_id=0,
            query_pre_attn_scalar=2 * shape.head_dim + 3,
            sliding_window=shape.window,
            attn_logit_softcapping=2.0,
            final_logit_softcapping=5.0,
        )
    )


def gemma3(shape: Shape) -> PretrainedConfig:
    """Gemma 3 text: five windowed layers to a global one, each with its own rope."""
    ropes = {
        "full_attention": {
            "rope_type": "linear",
            "rope_theta": 50 * shape.theta,
            "factor": 8.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": shape.theta},
    }
    return transformers.Gemma3TextConfig(
        **_common(
            shape,
            num_hidden_layers=6 + shape.pattern_tail,
            head_dim=shape.head_dim,
            pad_token_id=0,
            query_pre_attn_scalar=2 * shape.head_dim + 3,
            sliding_window=shape.window,
            rope_parameters=ropes,
        )
    )


def gpt2(shape: Shape) -> PretrainedConfig:
    """GPT-2: learned positions, layer norms, biases everywhere."""
    return transformers.GPT2Config(
        vocab_size=shape.vocab,
        n_embd=shape.hidden,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_inner=shape.intermediate,
        n_positions=MAX_POSITION,
        layer_norm_epsilon=shape.norm_eps,
        bos_token_id=1,
        eos_token_id=EOS,
    )


def olmo2(shape: Shape) -> PretrainedConfig:
    """OLMo 2: norms after the blocks, queries and keys normalised across heads."""
    return transformers.Olmo2Config(**_common(shape, pad_token_id=0))


def phi3(shape: Shape) -> PretrainedConfig:
    """Phi 3: fused projections, and the window that Phi-3-mini-4k has."""
    return transformers.Phi3Config(
        **_common(shape, pad_token_id=0, sliding_window=shape.window + 7)
    )


FAMILIES: dict[str, Callable[[Shape], PretrainedConfig]] = {
    f.__name__: f
    for f in (
        llama,
        llama3,
        mistral,
        qwen2,
        qwen3,
        gemma2,
        gemma3,
        gpt2,
        olmo2,
        phi3,
    )
}


def build(family: str, shape: Shape, rng: np.random.Generator) -> PreTrainedModel:
    """Returns a model of the family whose every weight shows in its logits."""
    config = FAMILIES[family](shape)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = _values(name, tuple(parameter.shape), family, rng)
            parameter.copy_(torch.from_numpy(values))
    return model.to(getattr(torch, shape.dtype))


def _values(
    name: str, shape: tuple[int, ...], family: str, rng: np.random.Generator
) -> np.ndarray:
    """Returns random weights: norms away from 1, biases away from 0."""
    if name.endswith("bias"):
        return 0.3 * rng.standard_normal(shape)
    if len(shape) == 1:  # Gemma stores a norm's distance from 1
        return rng.uniform(0.5, 1.5, shape) - family.startswith("gemma")
    if name.endswith(("embed_tokens.weight", "wte.weight", "wpe.weight")):
        return 0.2 * rng.standard_normal(shape)
    fan_in = shape[0] if family == "gpt2" else shape[1]
    writes = ("lm_head.weight", "o_proj.weight", "down_proj.weight", "c_proj.weight")
    gain = 1.5 if name.endswith(writes) else 1.0
    return gain / fan_in**0.5 * rng.standard_normal(shape)


def load(path: pathlib.Path, **options: Any) -> Any:
    """Returns the model of a directory, computing in float32 without kernels."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager", **options
    )


def logits(
    model: torch.nn.Module, tokens: np.ndarray, lengths: np.ndarray
) -> np.ndarray:
    """Returns the logits `[B, T, V]` of right-padded rows, zero in the padding."""
    rows = []
    for row, length in zip(tokens, lengths, strict=True):
        found = _forward(model, row[:length])
        rows.append(np.pad(found, ((0, len(row) - length), (0, 0))))
    return np.stack(rows)


def _forward(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Returns the logits `[T, V]` of one sequence."""
    with torch.no_grad():
        batch = torch.from_numpy(ids.astype(np.int64))[None]
        return model(input_ids=batch, use_cache=False).logits[0].numpy()


def batch(vocab: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns `tokens`, right-padded with 0 to unequal `lengths`."""
    width = int(rng.integers(64, 81))
    lengths = np.array([width, rng.integers(40, width), rng.integers(2, 40)])
    tokens = rng.integers(0, vocab, (3, width))
    tokens[np.arange(width) >= lengths[:, None]] = 0
    return {"tokens": tokens.astype(np.int32), "lengths": lengths.astype(np.int32)}


def continuation(
    model: torch.nn.Module, vocab: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns a `prompt` and its `greedy` tokens: varied, no near tie, no EOS.

    Or nothing: some models are drawn to EOS or to a tie from wherever they start.
    """
    best: dict[str, np.ndarray] = {}
    for _ in range(NUM_PROMPTS):
        prompt = rng.integers(3, vocab, int(rng.integers(4, 13))).astype(np.int32)
        greedy = _greedy(model, prompt)
        if greedy is not None and _distinct(greedy) > _distinct(best.get("greedy", [])):
            best = {"prompt": prompt, "greedy": greedy}
    return best


def _distinct(tokens: Sequence[int] | np.ndarray) -> int:
    """Returns how many different tokens there are."""
    return len(set(map(int, tokens)))


def _greedy(model: torch.nn.Module, prompt: np.ndarray) -> np.ndarray | None:
    """Returns the greedy tokens, or None where one is too close to call, or EOS."""
    ids = prompt
    for _ in range(NUM_GREEDY):
        last = _forward(model, ids)[-1]
        second, best = np.argsort(last)[-2:]
        if best == EOS or last[best] - last[second] < MARGIN:
            return None
        ids = np.append(ids, best.astype(np.int32))
    return ids[len(prompt) :]


def gradients(
    model: torch.nn.Module, vocab: int, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """Returns a weighted batch, its `loss` and `gradient/<name>` of every weight."""
    tokens = rng.integers(0, vocab, (2, 49)).astype(np.int32)
    weights = rng.uniform(0.0, 2.0, (2, 48)).astype(np.float32)
    weights[1, 30:] = 0.0
    targets = torch.from_numpy(tokens[:, 1:].astype(np.int64))
    found = model(input_ids=torch.from_numpy(tokens[:, :-1].astype(np.int64))).logits
    losses = torch.nn.functional.cross_entropy(
        found.transpose(1, 2), targets, reduction="none"
    )
    scale = torch.from_numpy(weights)
    loss = (losses * scale).sum() / scale.sum()
    loss.backward()
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "loss": loss.detach().numpy(),
        **{f"gradient/{n}": p.grad.numpy() for n, p in model.named_parameters()},
    }
