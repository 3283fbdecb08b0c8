"""What the steps of a run read: its corpus, and this process's part of every batch."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from scaletrain import cluster, data, sharding
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.step import Program


def prepare(run: RunConfig) -> data.Corpus:
    """Returns the corpus, read by one process of a host before the others look."""
    corpus = None
    for turn in range(3):
        if turn == cluster.turn():
            corpus = data.prepare(run, say)
        cluster.wait("corpus")
    assert corpus is not None, "every process has a turn"
    return corpus


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
    run, layout = program.run, program.batch["tokens"]
    parts = run.batch_size // layout.shape[0]
    return data.training_batches(
        sequences,
        seed=run.seed,
        batch_size=layout.shape[0],
        rows=sharding.rows_here(layout),
        start_step=start * parts,
        left_out=[(step * parts, batches * parts) for step, batches in left_out],
    )


def documents_of(
    program: Program, sequences: Any, now: int, left_out: Sequence[tuple[int, int]]
) -> list[int]:
    """Returns the ids of the documents that step `now` reads, see `batches_of`."""
    run, rows = program.run, program.batch["tokens"].shape[0]
    parts = run.batch_size // rows
    found: set[int] = set()
    for part in range(parts):
        found |= data.training_documents(
            sequences,
            seed=run.seed,
            batch_size=rows,
            step=(now - 1) * parts + part,
            left_out=[(step * parts, batches * parts) for step, batches in left_out],
        )
    return sorted(found)
