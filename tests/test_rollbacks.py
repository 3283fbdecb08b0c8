"""Updates that are skipped, going back, and being killed on the way."""

import itertools
import json

import grain
import jax
import numpy as np
import pytest
import small

from scaletrain import checkpoint, data, evaluate, train
from scaletrain.checkpoint import writer
from scaletrain.config import MeshConfig
from scaletrain.data.sequences import RandomSequences
from scaletrain.errors import CheckpointError, DivergedError
from scaletrain.rollbacks import Diverged, Rollbacks
from scaletrain.workdir import Workdir

# Steps 1 to 4 read batches 0 to 3, of which one is skipped. Steps 6 to 8 read three bad
# ones; from step 4 the run goes on with batch 8. Steps 7 to 9 read three bad ones; from
# step 6 the run goes on with batch 13.
POISONED = (2, 5, 6, 7, 10, 11, 12)
READ = (0, 1, 2, 3, 8, 9, 13, 14, 15, 16)
RUN = small.changed(
    small.RUN,
    num_steps=len(READ),
    accumulate_steps=2,
    log_every_steps=1,
    mesh=MeshConfig(fsdp=4),
    checkpoint__every_steps=2,
    optim__max_skipped_steps=3,
)


class Killed(BaseException):
    """What no handler of the code under test catches."""


class Poisoned:
    """The sequences of a run; of a poisoned batch one row is not a number."""

    def __init__(self, whole):
        self.whole, self.split, self.seq_len = whole, whole.split, whole.seq_len
        order = grain.MapDataset.range(len(whole)).shuffle(RUN.seed)
        self.numbers = [
            [order[RUN.batch_size * batch + row] for row in range(RUN.batch_size)]
            for batch in range(20)
        ]
        self.poisoned = {self.numbers[batch][11] for batch in POISONED}
        self.documents = whole.documents

    def __len__(self):
        return len(self.whole)

    def __getitem__(self, index):
        row = self.whole[index]
        if index in self.poisoned:
            row["weights"][3] = np.nan
        return row


@pytest.fixture(scope="module")
def taken():
    """The step of all runs here, compiled once, and where they begin."""
    return small.Taken(RUN)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch, taken):
    """Runs see four devices and poisoned sequences, and evaluate nothing."""
    taken.stand_in(monkeypatch)
    monkeypatch.setattr(evaluate, "evaluate", lambda *args: {})
    whole = data.sequences
    monkeypatch.setattr(data, "sequences", lambda *args: Poisoned(whole(*args)))


def sequences():
    """Returns the training sequences of a run."""
    return Poisoned(RandomSequences(RUN, "train"))


def records(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if name in r]


def outcome(workdir, taken):
    """Returns the losses of a run, its last parameters and where it went back."""
    losses = {r["step"]: (r["loss"], r["batch_hash"]) for r in records(workdir, "loss")}
    checkpoints, newest = checkpoint.reading(str(workdir), RUN, None)
    params = checkpoints.restore_params(newest, taken.program.state.params)
    gone = json.loads((workdir / "rollbacks.json").read_text())
    return losses, jax.device_get(params), [(r["step"], r["left_out"]) for r in gone]


def assert_same(one, two):
    assert one[0] == two[0]
    assert one[2] == two[2]
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])


@pytest.fixture(scope="module")
def straight(taken):
    """What steps taken by hand give, with the batches that are wanted."""
    batches = data.training_batches(
        sequences(), seed=RUN.seed, batch_size=16, rows=range(16)
    )
    batches = list(itertools.islice(batches, max(READ) + 1))
    losses = {}
    for now, batch in enumerate(READ, start=1):
        numbers = taken.step(batches[batch])
        loss = numbers["loss"] if np.isfinite(numbers["loss"]) else None
        losses[now] = (loss, numbers["batch_hash"])
    return losses, jax.device_get(taken.state.params), [(4, 4), (6, 3)]


def test_a_run_goes_back_stops_and_goes_on(straight, taken, tmp_path, capsys):
    once = small.changed(RUN, optim__max_rollbacks=1)
    with pytest.raises(DivergedError) as caught:
        train.train(once, str(tmp_path))
    story = str(caught.value)
    for told in (
        "step 9: no update for 3 steps in a row",
        "went back optim.max_rollbacks=1 times",
        "steps 6 to 8 skipped; back to step 4 without 4 batches",
        "newest checkpoint: 8",
    ):
        assert told in story
    said = capsys.readouterr().err
    for step in (3, 6, 7, 8, 9):  # 7 and 8 twice: before going back, and after
        words = f"step {step}: update skipped, loss or gradient not finite"
        assert (said + story).count(words) == 1 + (step in (7, 8))
    assert "going back to step 4; the 4 batches since are left out" in said
    assert "removing checkpoint 6" in said
    # The one skip that was not gone back on, with the documents of its batch.
    found = records(tmp_path, "skip_reason")[0]
    assert (found["step"], found["skip_loss"]) == (3, None)
    assert found["skip_documents"] == sorted(sequences().numbers[2])
    assert found["skip_num_documents"] == RUN.batch_size
    train.train(RUN, str(tmp_path))
    assert_same(outcome(tmp_path, taken), straight)
    # Checkpoints that lie elsewhere alone know as much.
    (tmp_path / "rollbacks.json").unlink()
    checkpoints, _ = checkpoint.reading(str(tmp_path), RUN, None)
    found = Rollbacks(Workdir(tmp_path), checkpoints, print)
    assert found.left_out == [(4, 4), (6, 3)]


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["record", "removal", "half removed", "save"])
def test_killed_while_going_back_ends_as_if_it_had_not(
    straight, taken, tmp_path, monkeypatch, moment
):
    owner, name, after = {
        "record": (Rollbacks, "_write", 0),
        "removal": (checkpoint.Store, "remove", 0),
        "half removed": (writer.shutil, "rmtree", 0),
        "save": (checkpoint.Store, "save", 3),
    }[moment]
    whole, calls = getattr(owner, name), itertools.count()

    def killed(*args, **kwargs):
        if next(calls) == after:
            if moment == "half removed":
                whole(args[0] / "rest")
            raise Killed
        return whole(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, killed)
        with pytest.raises(Killed):
            train.train(RUN, str(tmp_path))
    assert (tmp_path / "rollbacks.json").exists() == (moment != "record")
    train.train(RUN, str(tmp_path))
    assert_same(outcome(tmp_path, taken), straight)


def left_out_before(left_out, now):
    return sum(batches for at, batches in left_out if at < now)


class Listed:
    """Checkpoints that are numbers, and know how often a run had gone back."""

    run = small.changed(RUN, optim__max_rollbacks=4)

    def __init__(self, known):
        self.known = known
        self.remove, self.finish = known.pop, lambda: None
        self.latest, self.steps = lambda: max(known), lambda: sorted(known)
        self.newest_undamaged = self.latest
        self.data = lambda at: {"rollbacks": [{}] * known[at]}


@pytest.mark.parametrize(
    "text",
    [
        "x", "3", "null", "{}", '["a"]', '[["step", "left_out"]]', '[{"step": 1}]',
        '[{"step": 1, "left_out": "x"}]', '[{"step": null, "left_out": 1}]',
    ],
)  # fmt: skip
def test_a_damaged_account_of_what_was_left_out_is_refused(text, tmp_path):
    (tmp_path / "rollbacks.json").write_text(text)
    with pytest.raises(CheckpointError, match="rollbacks.json; damaged .*remove it"):
        Rollbacks(Workdir(tmp_path), Listed({0: 0}), print)


def test_what_did_not_help_once_is_not_gone_back_to_again(tmp_path):
    listed = Listed({0: 0, 4: 0, 8: 0, 10: 0})
    rollbacks = Rollbacks(Workdir(tmp_path), listed, print)
    read = set()
    for skipped, saved, target, left_out in (
        ((9, 11), 10, 8, [(8, 3)]),  # 10 was saved in between
        ((9, 10), 8, 4, [(4, 9)]),  # 8 did not help; batches 4 to 12 had been read
        ((13, 14), 12, 12, [(4, 9), (12, 2)]),  # 12 is new
        ((13, 14), 12, 12, [(4, 9), (12, 2), (12, 2)]),  # before it is nothing untried
    ):
        listed.known.setdefault(saved, len(rollbacks.records))
        steps = range(1, skipped[1] + 1)
        read |= {now - 1 + left_out_before(rollbacks.left_out, now) for now in steps}
        assert rollbacks.go_back(Diverged(*skipped, [])) == target
        assert rollbacks.left_out == left_out
        assert listed.latest() == target
        # The first batch that is read then is the first that never was.
        assert target + left_out_before(left_out, target + 1) == max(read) + 1
    with pytest.raises(DivergedError, match="went back optim.max_rollbacks=4 times"):
        rollbacks.go_back(Diverged(13, 14, []))
    assert Rollbacks(Workdir(tmp_path), listed, print).left_out == rollbacks.left_out
