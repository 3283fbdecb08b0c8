"""Objectives: functions of a model and a batch whose value training minimises.

An objective returns `(objective, sums)`: the scalar that is differentiated, summed over
weighted tokens, and the sums that evaluation reports. It never divides by tokens: a
batch may be one of several micro-batches.
"""

from collections.abc import Callable
from typing import Any

import jax

from scaletrain.config import RunConfig
from scaletrain.losses import Head, LossSums, head_loss
from scaletrain.models import Decoder

Batch = dict[str, Any]  # tokens, targets, segments, positions, weights: [B, T]
Objective = Callable[[Decoder, Batch, RunConfig], tuple[jax.Array, LossSums]]


def next_token(
    model: Decoder, batch: Batch, run: RunConfig
) -> tuple[jax.Array, LossSums]:
    """Returns the summed cross-entropy with its z-loss, and the sums of both.

    Args:
      model: a decoder with its parameters.
      batch: see `Batch`; with "key" [B], a random key for each sequence, dropout is on.
      run: the settings of the head and of the z-loss.
    """
    x_BTD, _ = model.features(
        batch["tokens"], batch["positions"], batch["segments"], batch.get("key")
    )
    head = Head(
        precision=run.precision,
        vocab_first=run.model.head == "tied",
        soft_cap=run.model.logit_soft_cap,
        z_loss=run.optim.z_loss,
        trained=run.lora.rank == 0,
    )
    with jax.named_scope("head"):
        return head_loss(head, x_BTD, model.output, batch["targets"], batch["weights"])
