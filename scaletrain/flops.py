"""The FLOPs of a step, counted from the settings alone.

There are two conventions, both without recomputation, N being every matmul weight with
the output head and without the embedding lookup:
  mfu       6 N + 6 L d_attn T    a causal query sees half the keys
  mfu_palm  6 N + 12 L d_attn T   PaLM's (arXiv 2204.02311, appendix B)
A sliding window caps the keys a query sees in both.
"""

import math

from scaletrain import matrices
from scaletrain.config import ModelConfig, RunConfig


def matmul_weights(model: ModelConfig) -> int:
    """Returns the number of matmul weights, with the head, without adapters."""
    layer = sum(math.prod(m.shape(model)) for m in matrices.of_layer(model))
    return model.num_layers * layer + math.prod(matrices.HEAD.shape(model))


def flops_per_token(run: RunConfig) -> tuple[float, float]:
    """Returns forward and backward FLOPs a token: (causal, PaLM's convention).

    A frozen matrix has no gradient of its own: 4 FLOPs a weight instead of 6.

    Example:
      >>> from scaletrain.config import ModelConfig
      >>> flops_per_token(RunConfig(seq_len=128, model=ModelConfig(num_layers=1)))
      (7274496.0, 7471104)
    """
    model, lora = run.model, run.lora
    adapters = sum(
        lora.rank * sum(matrix.shape(model))
        for matrix in matrices.of_layer(model)
        if matrix.name in lora.adapted
    )
    weights = (4 if lora.rank else 6) * matmul_weights(model)
    weights += 6 * model.num_layers * adapters
    per_key = 12 * model.num_heads * model.d_head
    keys = [keys_seen(model, i, run.seq_len) for i in range(model.num_layers)]
    causal, palm = (per_key * sum(each) for each in zip(*keys, strict=True))
    return weights + causal, weights + palm


def keys_seen(model: ModelConfig, layer: int, seq_len: int) -> tuple[float, float]:
    """Returns the average number of keys of a query: (causal, PaLM's convention).

    Args:
      model: its sliding window counts.
      layer: index of the layer.
      seq_len: tokens of a sequence.
    """
    window = model.sliding_window
    if not model.is_local(layer) or window >= seq_len:
        return seq_len / 2, seq_len
    return window * (1 - window / (2 * seq_len)), window
