"""The input of a run: its corpus, and the rows of each batch that a process reads."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaletrain import cluster, data, sharding
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.program import Program


def prepare(run: RunConfig, tokenizer: data.Tokenizer | None = None) -> data.Corpus:
    """Returns the corpus, which one process of a host prepares for the others.

    Args:
      run: the settings.
      tokenizer: see `data.prepare`.
    """
    return cluster.in_turns(lambda: data.prepare(run, say, tokenizer))


def batches_of(
    program: Program,
    sequences: Any,
    start: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of every batch after step `start`.

    Args:
      program: with the sharding of a batch.
      sequences: of the training split.
      start: the number of steps already taken.
      left_out: pairs (step, batches): so many batches are left out after that step.
    """
    return data.training_batches(
        sequences,
        seed=program.run.seed,
        batch_size=program.run.batch_size,
        rows=sharding.local_rows(program.batch["tokens"]),
        start_step=start,
        left_out=left_out,
    )


def documents_of(
    program: Program, sequences: Any, step: int, left_out: Sequence[tuple[int, int]]
) -> list[int]:
    """Returns the sorted ids of the documents in the batch of `step`.

    Args:
      program: with the settings.
      sequences: of the training split.
      step: its number, from 1.
      left_out: as for `batches_of`.
    """
    documents = data.training_documents(
        sequences,
        seed=program.run.seed,
        batch_size=program.run.batch_size,
        step=step - 1,
        left_out=left_out,
    )
    return sorted(documents)
