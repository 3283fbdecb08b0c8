"""Signals at every moment of a run: what it saves, and that it goes on as if not."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np
import pytest
import small

from scaletrain import checkpoint, compilation, data, input_pipeline, train
from scaletrain.cluster import signals
from scaletrain.config import MeshConfig
from scaletrain.errors import Interrupted

RUN = small.changed(
    small.RUN,
    num_steps=6,
    log_every_steps=1,
    eval_every_steps=2,
    mesh=MeshConfig(data=1),
    checkpoint__every_steps=3,
)


@pytest.fixture
def taken(monkeypatch):
    """The step of all attempts, compiled once."""
    found = small.Taken(RUN)
    found.stand_in(monkeypatch)
    return found


@pytest.fixture
def handlers():
    """Gives signals back what they had."""
    before = {number: signal.getsignal(number) for number in signals.SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)
    signals._requests = signals._Requests()


def signalled(whole, at):
    """Returns `whole`, called with a signal the `at`-th time."""
    left = [at]

    def called(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*args, **kwargs)

    return called


def in_batches(whole, at):
    """Returns `whole`, whose `at`-th batch comes with a signal."""

    def batches(*args, **kwargs):
        for i, batch in enumerate(whole(*args, **kwargs), start=1):
            if i == at:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    return batches


def records(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [(r["step"], r[name]) for r in map(json.loads, lines) if name in r]


def outcome(workdir, taken):
    """Returns what a run said of its steps and evaluations, and its last parameters."""
    checkpoints, newest = checkpoint.reading(str(workdir), RUN, None)
    params = checkpoints.restore_params(newest, taken.program.state.params)
    told = [records(workdir, name) for name in ("loss", "batch_hash", "eval_loss")]
    return told, jax.device_get(params)


# Where the signal comes, the n-th time there; the step that is saved then.
MOMENTS = [
    ("tokenisation", input_pipeline, "prepare", signalled, 1, None),
    ("compile", compilation, "compiled", signalled, 1, None),
    ("evaluation", data, "validation_batches", in_batches, 2, 2),
    ("restore", checkpoint.Store, "restore", signalled, 1, 2),
    ("evaluation that is owed", data, "validation_batches", in_batches, 1, 2),
    ("save", checkpoint.Store, "save", signalled, 1, 4),
    ("last save", checkpoint.Store, "save", signalled, 1, 6),
    ("last evaluation", data, "validation_batches", in_batches, 4, 6),
]


def test_signals_at_every_moment_change_nothing(taken, tmp_path, monkeypatch, handlers):
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train.train(RUN, str(straight))
    for moment, owner, name, how, at, saved in MOMENTS:
        signals.catch()
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, how(getattr(owner, name), at))
            with pytest.raises(Interrupted) as caught:
                train.train(RUN, str(stopped))
        steps = [int(p.name) for p in (stopped / "checkpoints").glob("?")]
        assert max(steps, default=None) == saved, moment
        if moment in ("tokenisation", "compile", "restore"):
            assert "there was nothing to save" in str(caught.value)
        else:
            assert f"stopped by a signal at step {saved}; saved " in str(caught.value)
            assert records(stopped, "stop_to_saved_s")[-1][0] == saved
    signals.catch()
    train.train(RUN, str(stopped))
    (told, params), (wanted, same) = outcome(stopped, taken), outcome(straight, taken)
    assert [step for step, _ in wanted[2]] == [2, 4, 6]
    assert told == wanted
    jax.tree.map(np.testing.assert_array_equal, params, same)


# A main thread that C keeps from running Python's handler, as compilations do.
STUCK = """
    import contextlib, hashlib, sys
    from scaletrain import errors
    from scaletrain.cluster import signals

    signals.catch()
    try:
        with signals.at_once() if sys.argv[1] == "first" else contextlib.nullcontext():
            print("stuck", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    except errors.Interrupted as err:  # not stuck yet
        sys.exit(print(err, file=sys.stderr) or err.exit_code)
"""


@pytest.mark.parametrize(
    ("counts", "code", "words"),
    [
        ("first", 75, "stopped by a signal before the first step"),
        ("second", -signal.SIGTERM, "SIGTERM: stopping after this step"),
    ],
)
def test_a_signal_ends_what_does_not_return_to_python(counts, code, words):
    line = [sys.executable, "-c", textwrap.dedent(STUCK), counts]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "stuck\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        said = process.stderr.readline()  # before a second one is sent
        if counts == "second":
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) == code
    assert words in said
    if counts == "second":
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("around", ["an error of its own", ""])
def test_a_library_cannot_hide_a_stop(handlers, around):
    """As Orbax does, which reads arrays side by side and raises what it makes of it."""

    def library():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Interrupted as err:
            if around:
                raise RuntimeError(around) from err

    signals.catch()
    with pytest.raises(Interrupted), signals.at_once():
        library()
