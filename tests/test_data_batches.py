"""Batches: a pure function of (seed, step), whoever reads which rows."""

import itertools
import pathlib
import sys
from collections.abc import Sequence

import numpy as np
import pytest

from scaletrain import data
from scaletrain.data import Split
from scaletrain.data.sequences import blank
from scaletrain.errors import DataError

SEQ_LEN = 3


class Numbers:
    """Sequences that hold their own number, and remember who asked for it."""

    split: Split | None = None
    seq_len = SEQ_LEN

    def __init__(self, length):
        self.length, self.read = length, set()

    def __len__(self):
        return self.length

    def documents(self, index):
        """Returns two ids that no other number has."""
        return [10 * index, 10 * index + 5]

    def __getitem__(self, index):
        self.read.add(index)
        row = blank(SEQ_LEN)
        row["tokens"] += index
        row["weights"] += 1
        return row


def steps(
    count: int,
    *,
    length=23,
    seed=0,
    batch_size=5,
    rows: Sequence[int] = range(5),
    start_step=0,
    left_out=(),
):
    """Returns [count, len(rows)], the numbers of the sequences in the batches."""
    batches = data.training_batches(
        Numbers(length),
        seed=seed,
        batch_size=batch_size,
        rows=rows,
        start_step=start_step,
        left_out=left_out,
    )
    return np.stack([b["tokens"][:, 0] for b in itertools.islice(batches, count)])


def validated(length, **options):
    """Returns what a validation read, and the [batch, row] weights."""
    found = list(data.validation_batches(Numbers(length), **options))
    weights = [batch["weights"][:, 0].tolist() for batch in found]
    return [batch["tokens"][:, 0].tolist() for batch in found], weights


def test_a_batch_is_stacked_rows_and_nothing_else():
    batch = next(
        data.training_batches(Numbers(9), seed=0, batch_size=4, rows=[0, 2, 3])
    )
    expected = {name: row.dtype for name, row in blank(SEQ_LEN).items()}
    assert {name: value.dtype for name, value in batch.items()} == expected
    assert {value.shape for value in batch.values()} == {(3, SEQ_LEN)}


def test_the_hosts_together_read_the_batches_of_one():
    one = steps(12)
    splits = ([0, 1, 2], [3, 4]), ([4, 0], [2], [3, 1])
    for hosts in splits:
        joined = np.empty_like(one)
        for rows in hosts:
            joined[:, rows] = steps(12, rows=rows)
        np.testing.assert_array_equal(joined, one)


def test_a_batch_in_parts_is_the_batch():
    # The parts of an accumulated batch are batches of their own, s * parts + part.
    whole = steps(6, batch_size=6, rows=range(6))
    parts = steps(12, batch_size=3, rows=range(3))
    np.testing.assert_array_equal(parts.reshape(6, 6), whole)


@pytest.mark.parametrize("start_step", [1, 4, 5, 17])
def test_a_late_start_reads_what_would_have_come(start_step):
    expected = steps(start_step + 6)[start_step:]
    np.testing.assert_array_equal(steps(6, start_step=start_step), expected)


@pytest.mark.parametrize("start_step", [0, 2, 3, 9])
def test_batches_left_out_are_never_read(start_step):
    straight = steps(30)
    wanted = np.delete(straight, [3, 4, 9], axis=0)[start_step : start_step + 12]
    left_out = ((3, 2), (7, 1))
    found = steps(12, start_step=start_step, left_out=left_out)
    np.testing.assert_array_equal(found, wanted)
    # What is left out from one step on adds up: the second time there, one more.
    twice = steps(4, left_out=((2, 1), (2, 3)))
    np.testing.assert_array_equal(twice, straight[[0, 1, 6, 7]])


def test_documents_are_those_of_the_batch():
    straight = steps(12, seed=5)
    for step in (0, 3, 7):
        numbers = straight[step + (3 if step >= 3 else 0)]
        found = data.training_documents(
            Numbers(23), seed=5, batch_size=5, step=step, left_out=((3, 3),)
        )
        assert found == {d for n in numbers for d in Numbers(23).documents(n)}


def test_a_late_start_reads_nothing_before():
    source = Numbers(10**6)
    batches = data.training_batches(
        source, seed=3, batch_size=8, rows=range(8), start_step=10**9
    )
    next(batches)
    assert len(source.read) <= 8 * 20  # what is read ahead, and no more


def test_epochs_are_permutations_of_their_own():
    order = steps(23 * 3).reshape(15, 23)  # batches reach across the ends of epochs
    for epoch in order:
        assert sorted(epoch.tolist()) == list(range(23))
    assert len({tuple(epoch.tolist()) for epoch in order}) == 15
    assert tuple(order[0].tolist()) != tuple(range(23))


def test_the_order_follows_the_seed():
    assert steps(4, seed=1).tolist() == steps(4, seed=1).tolist()
    orders = {str(steps(4, seed=seed)) for seed in (0, 1, 2, 2**32 - 1)}
    assert len(orders) == 4


def test_a_single_sequence_is_repeated():
    assert steps(2, length=1).tolist() == [[0] * 5] * 2


def test_training_reads_its_own_rows_only():
    source = Numbers(10**6)
    batches = data.training_batches(source, seed=0, batch_size=64, rows=[7, 9])
    wanted = {
        i for b in itertools.islice(batches, 3) for i in b["tokens"][:, 0].tolist()
    }
    del batches
    reach = steps(3 + 20, length=10**6, batch_size=64, rows=[7, 9])
    assert wanted <= source.read <= set(reach.ravel().tolist())


def test_validation_is_in_order_and_filled_up():
    found, weights = validated(11, batch_size=4, rows=range(4))
    assert found == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 0]]
    assert weights == [[1] * 4, [1] * 4, [1, 1, 1, 0]]


def test_validation_gives_every_host_as_many_batches():
    assert validated(9, batch_size=4, rows=[2, 3])[1] == [[1, 1], [1, 1], [0, 0]]
    assert validated(9, batch_size=4, rows=[3, 0])[0] == [[3, 0], [7, 4], [0, 8]]


@pytest.mark.parametrize(("num_batches", "count"), [(0, 3), (1, 1), (3, 3), (9, 3)])
def test_validation_stops_where_it_is_told(num_batches, count):
    options = {"batch_size": 4, "rows": range(4), "num_batches": num_batches}
    assert len(validated(11, **options)[0]) == count


def test_validation_of_nothing_is_no_batch():
    assert validated(0, batch_size=4, rows=range(4)) == ([], [])
    source = Numbers(100)
    list(data.validation_batches(source, batch_size=10, rows=[1], num_batches=2))
    assert source.read == {1, 11}


def test_the_order_of_a_seed_is_for_good():
    # Resuming a run relies on it; a change here breaks every checkpoint there is.
    expected = [[14, 18, 7, 13, 21], [19, 22, 2, 4, 10]]
    assert steps(2, seed=42).tolist() == expected


def test_what_goes_wrong_while_reading_ahead_is_told():
    class Damaged(Numbers):
        def __getitem__(self, index):
            raise DataError(f"{index}; the cache is damaged")

    batches = data.training_batches(Damaged(9), seed=0, batch_size=2, rows=[1])
    with pytest.raises(DataError, match="the cache is damaged"):
        next(batches)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for children")
def test_reading_has_no_worker_processes_that_could_be_killed():
    def children():
        files = pathlib.Path("/proc/self/task").glob("*/children")
        return {pid for path in files for pid in path.read_text().split()}

    before = children()
    batches = data.training_batches(Numbers(23), seed=0, batch_size=5, rows=range(5))
    for _ in range(20):
        next(batches)
        assert children() == before
