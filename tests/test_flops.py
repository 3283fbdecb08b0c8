"""What a step computes, counted from its settings."""

import dataclasses

import jax
import pytest
import small
from flax import nnx

from scaletrain import flops
from scaletrain.config import PrecisionConfig
from scaletrain.models import Decoder


@pytest.mark.parametrize(
    "settings",
    [{}, {"head": "tied"}, {"mlp": "gelu", "bias": "all"}, {"num_kv_heads": 4}],
)
def test_matmul_weights_are_the_matrices_of_the_model(settings):
    model = dataclasses.replace(small.MODEL, **settings)
    params = nnx.state(Decoder(model, PrecisionConfig(), jax.random.key(0)))
    used = 0
    for path, leaf in nnx.to_flat_state(params):
        tied = path[-1] == "embedding" and model.head == "tied"
        used += leaf.size if path[-1] == "weight" or tied else 0
    assert flops.matmul_weights(model) == used


def test_flops_of_llama_1b():
    """Against the sums done by hand."""
    model = dataclasses.replace(
        small.MODEL, num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8,
        d_head=64, d_ff=8192, vocab_size=32_768,
    )  # fmt: skip
    weights = 16 * (2 * 2048**2 * 1.25 + 3 * 2048 * 8192) + 2048 * 32_768
    run = small.changed(small.RUN, model=model, seq_len=4096)
    causal, palm = flops.flops_per_token(run)
    assert causal == 6 * weights + 6 * 16 * 2048 * 4096
    assert palm == 6 * weights + 12 * 16 * 2048 * 4096
    windowed = small.changed(run, model__sliding_window=1024)
    seen = sum(min(t + 1, 1024) for t in range(4096)) / 4096
    assert flops.flops_per_token(windowed)[0] == pytest.approx(
        6 * weights + 12 * 16 * 2048 * seen, rel=1e-3
    )
