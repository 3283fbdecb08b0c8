"""Batches: that of step s is a pure function of (seed, s) and of the skipped batches.

The number of processes, the first step that is read and the number of micro-batches
change nothing: a process asks for rows by their number in the global batch and
reads no others. Grain shuffles, reads, stacks and prefetches.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from scaletrain.data.sequences import Sequences, blank

# Complete batches are read ahead; more threads would only queue for the interpreter.
_READ = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)
_ENDLESS = 2**48  # batches; times the rows of a batch it must fit Grain's 64-bit index


def training_batches(
    sequences: Sequences,
    *,
    seed: int,
    batch_size: int,
    rows: Sequence[int],
    start_step: int = 0,
    left_out: Sequence[tuple[int, int]] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `rows` of the batches from `start_step` on, without end.

    Row r of step s is element s * batch_size + r of all sequences shuffled globally and
    repeated, where s also counts the batches skipped until then. Each epoch has its
    own order: Grain shuffles epoch e with seed + e, so two runs whose seeds differ by
    one have the same orders one epoch apart. A batch may reach into the next epoch.
    Starting late costs nothing.

    Args:
      sequences: the examples to draw from.
      seed: of the order, in [0, 2**32).
      batch_size: sequences in the global batch.
      rows: the rows of this process, numbers in [0, batch_size), in any order.
      start_step: the first step to read, from 0.
      left_out: pairs (step, n): from that step on, reading is n batches further.
    """
    shuffled = _shuffled(grain.MapDataset.source(sequences), seed)
    picked = _Rows(shuffled, sequences.seq_len, batch_size, rows, _ENDLESS, left_out)
    return _stacked(picked, start_step)


def training_documents(
    sequences: Sequences,
    *,
    seed: int,
    batch_size: int,
    step: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> set[int]:
    """Returns the ids of the documents in the batch of a step, see `Sequences`.

    Args:
      sequences: the examples to draw from.
      seed: of the order, as for `training_batches`.
      batch_size: sequences in the global batch.
      step: the step of the batch, from 0.
      left_out: the skipped batches, as for `training_batches`.
    """
    order = _shuffled(grain.MapDataset.range(len(sequences)), seed)
    first = _batch_of(step, left_out) * batch_size
    numbers = {int(order[first + row]) for row in range(batch_size)}
    return {document for number in numbers for document in sequences.documents(number)}


def _shuffled(elements: grain.MapDataset, seed: int) -> Any:
    """Returns the elements in the order of training, without end.

    The order depends on the number of elements and on the seed alone, so that of the
    numbers of sequences is that of the sequences.
    """
    return elements.shuffle(seed).repeat()


def _batch_of(step: int, left_out: Sequence[tuple[int, int]]) -> int:
    """Returns the number of the batch that a step reads."""
    return step + sum(batches for first, batches in left_out if first <= step)


def validation_batches(
    sequences: Sequences, *, batch_size: int, rows: Sequence[int], num_batches: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields `rows` of each batch in the order of the stream, once.

    The last batch is filled up with rows of weight 0, so every process gets the
    same number of batches.

    Args:
      sequences: the examples to read.
      batch_size: sequences in the global batch.
      rows: the rows of this process, numbers in [0, batch_size), in any order.
      num_batches: the most batches to read; 0 = all.
    """
    available = -(-len(sequences) // batch_size)
    count = min(num_batches, available) if num_batches else available
    picked = _Rows(sequences, sequences.seq_len, batch_size, rows, count)
    return _stacked(picked, 0)


class _Rows:
    """The rows of one process, batch after batch, as a source for Grain."""

    def __init__(
        self,
        source: Any,
        seq_len: int,
        batch_size: int,
        rows: Sequence[int],
        num_batches: int,
        left_out: Sequence[tuple[int, int]] = (),
    ):
        assert rows, "a process without rows has nothing to wait for"
        assert all(0 <= row < batch_size for row in rows)
        self._source, self._seq_len, self._batch_size = source, seq_len, batch_size
        self.rows, self._num_batches = tuple(int(row) for row in rows), num_batches
        self._left_out = tuple(left_out)

    def __len__(self) -> int:
        return self._num_batches * len(self.rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        step, place = divmod(index, len(self.rows))
        batch = _batch_of(step, self._left_out)
        element = batch * self._batch_size + self.rows[place]
        if element >= len(self._source):
            return blank(self._seq_len)
        return self._source[element]


def _stacked(picked: _Rows, start: int) -> Iterator[dict[str, np.ndarray]]:
    batches = grain.MapDataset.source(picked).batch(len(picked.rows))
    return iter(batches[start:].to_iter_dataset(_READ))
