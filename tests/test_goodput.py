"""What became of a run's time, whatever its clocks say."""

import itertools
import json
import time

import pytest
import small

from scaletrain import train
from scaletrain.config import MeshConfig
from scaletrain.monitor import goodput
from scaletrain.monitor.phase_clock import Phases
from scaletrain.workdir import Workdir


class Attempts:
    """Attempts on a machine whose time of day jumps by a day whenever it is asked."""

    def __init__(self, workdir, monkeypatch):
        self.workdir, self.now = workdir, 1000.0
        monkeypatch.setattr(time, "time", jumping())
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def start(self):
        """Begins an attempt, which ends as by SIGKILL."""
        self.phases = Phases(lambda: self.now)
        self.account = goodput.Account(Workdir(self.workdir), self.phases)

    def spend(self, name, seconds):
        """Spends time in a phase."""
        with self.phases(name):
            self.now += seconds

    def steps(self, first, last):
        """Takes the steps after `first`, each of a second, and writes what is known."""
        self.account.begin(first)
        for step in range(first + 1, last + 1):
            self.spend("step", 1.0)
            self.account.took(step)
        self.account._write()


def jumping():
    """Returns a time of day that is a day ahead or behind at every call."""
    clock, days = time.time, itertools.cycle([1, -1, 0])
    return lambda: clock() + 86_400 * next(days)


def test_the_parts_are_the_whole_and_lost_steps_are_lost(tmp_path, monkeypatch):
    run = Attempts(tmp_path, monkeypatch)
    run.start()
    run.spend("compile", 10.0)
    run.steps(0, 18)
    run.now += 7.0  # nothing is known of it: the machine was away
    run.start()  # ends before its first step
    run.spend("compile", 3.0)
    run.account._write()
    run.start()
    run.steps(10, 30)
    run.steps(20, 25)  # went back
    run.start()
    run.spend("save", 2.0)
    run.steps(8, 40)  # the newest checkpoint was damaged
    run.spend("step", 0.5)
    found = run.account.total()
    causes = found["seconds_by_cause"]
    assert causes["step"] == pytest.approx(40.0 + 0.5)
    assert causes["lost"] == pytest.approx(10 + 20 + 5)
    assert causes["down"] == pytest.approx(7.0)
    assert (causes["compile"], causes["save"]) == (13.0, 2.0)
    assert found["seconds"] == pytest.approx(run.now - 1000.0)
    assert sum(causes.values()) == pytest.approx(found["seconds"])
    assert found["attempts"] == 4
    assert goodput.in_words(found).startswith(
        "goodput 41.5% of 98 s in 4 attempts: lost"
    )


def test_time_after_a_run_had_finished_is_not_down(tmp_path, monkeypatch):
    run = Attempts(tmp_path, monkeypatch)
    run.start()
    run.steps(0, 10)
    run.account.finish()
    run.account._write()
    run.now += 1000.0  # until someone extends it
    run.start()
    run.steps(10, 15)
    run.now += 7.0  # until it is started again
    run.start()
    run.steps(15, 20)
    found = run.account.total()
    assert found["seconds"] == pytest.approx(10.0 + 5.0 + 7.0 + 5.0)
    assert found["seconds_by_cause"]["down"] == pytest.approx(7.0)
    assert found["goodput"] == pytest.approx(20.0 / 27.0)


def test_steps_that_did_not_end_are_lost(tmp_path, monkeypatch):
    run = Attempts(tmp_path, monkeypatch)
    run.start()
    run.account.begin(0)
    run.spend("step", 5.0)
    assert run.account.total()["seconds_by_cause"] == {"step": 0, "lost": 5, "other": 0}


def test_an_account_that_is_lost_or_not_ours_is_begun_anew(tmp_path):
    for content in (
        "[{",
        "3",
        "[3]",
        '[{"taken": 1}]',
        '[{"began": 1.0, "seconds": 3.0}]',
    ):
        (tmp_path / "attempts.json").write_text(content)
        with goodput.Account(Workdir(tmp_path), Phases()) as account:
            assert account.total()["attempts"] == 1
        assert len(json.loads((tmp_path / "attempts.json").read_text())) == 1
    path = tmp_path / "attempts.json"
    (ours,) = json.loads(path.read_text())
    keys = "began up boot from to taken finished phases seconds".split()
    assert list(ours) == keys
    others = [3, ours | {"phases": None}, ours | {"taken": 4}, ours | {"up": "x"}]
    path.write_text(json.dumps([ours, *others]))
    with goodput.Account(Workdir(tmp_path), Phases()) as account:
        assert account.total()["attempts"] == 2  # it and what was ours
    older = {name: value for name, value in ours.items() if name != "finished"}
    path.write_text(json.dumps([older]))
    (tmp_path / "attempts.json.partial").mkdir()  # nothing can be written
    with goodput.Account(Workdir(tmp_path), Phases()) as account:
        assert account.total()["attempts"] == 2


def test_a_run_whose_clock_jumps_tells_the_time(tmp_path, monkeypatch):
    """No step time, save interval or share is of the time of day.

    It jumps between saves: of one under way Orbax itself would say that it took a day.
    """
    run = small.changed(
        small.RUN,
        num_steps=6,
        log_every_steps=1,
        eval_every_steps=3,
        mesh=MeshConfig(data=1),
        checkpoint__every_minutes=10.0,
    )
    small.Taken(run).stand_in(monkeypatch)
    began, clock, days = time.monotonic(), time.time, {2: 1, 4: -1}
    ahead, took = [0], goodput.Account.took

    def jumps(account, now):
        ahead[0] += 86_400 * days.get(now, 0)
        took(account, now)

    monkeypatch.setattr(time, "time", lambda: clock() + ahead[0])
    monkeypatch.setattr(goodput.Account, "took", jumps)
    train.train(run, str(tmp_path))
    ahead[0] = 86_400
    train.train(run, str(tmp_path))
    spent = time.monotonic() - began
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = list(map(json.loads, lines))
    assert all(0 < r["step_time_s"] < spent for r in records if "loss" in r)
    assert [r["step"] for r in records if "save_stall_s" in r] == [6]
    *_, last = (r for r in records if "goodput" in r)
    assert last["attempts"] == 2
    assert 0.5 * spent < last["seconds"] < spent
    assert all(0 <= s < spent for s in last["seconds_by_cause"].values())
