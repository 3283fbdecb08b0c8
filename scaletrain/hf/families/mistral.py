"""Mistral (arXiv 2310.06825): Llama's layers behind a sliding window."""

import dataclasses

from scaletrain.hf.families import llama
from scaletrain.hf.families.mapping import Key

WINDOW = Key("sliding_window", "sliding_window", absent=4096, null=0)

FAMILY = dataclasses.replace(
    llama.FAMILY,
    name="mistral",
    model_types=("mistral",),
    architecture="MistralForCausalLM",
    keys=(*llama.KEYS, WINDOW),
    fixed={"hidden_act": ("silu",), "sliding_pattern": (0,)},
)
