"""What the steps of a run read: its corpus, and this process's part of every batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaletrain import cluster, data, sharding
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.program import Program


def prepare(run: RunConfig, tokenizer: data.Tokenizer | None = None) -> data.Corpus:
    """Returns the corpus, which the first process of a host makes for the others.

    Args:
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
      left_out: (step, batches): the steps after that one do without these batches.
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
    program: Program, sequences: Any, now: int, left_out: Sequence[tuple[int, int]]
) -> list[int]:
    """Returns the ids of the documents that step `now` reads, see `batches_of`."""
    documents = data.training_documents(
        sequences,
        seed=program.run.seed,
        batch_size=program.run.batch_size,
        step=now - 1,
        left_out=left_out,
    )
    return sorted(documents)
