"""The launch scripts, with real processes."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import small

from scaletrain import config, train
from scaletrain.config import DataConfig, MeshConfig

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = ["bash", str(ROOT / "launch" / "local.sh")]
ENV = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}


def launch(*args):
    return subprocess.run(
        [*LOCAL, *args],
        env=ENV,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def records(workdir, name):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    found = map(json.loads, lines)
    return {r["step"]: r[name] for r in found if name in r}


def kill_one(launched, workdir, at):
    """Kills the second process of a launch once step `at` is saved."""
    deadline = time.monotonic() + 240
    while not (workdir / "checkpoints" / str(at)).is_dir():
        assert time.monotonic() < deadline
        assert launched.poll() is None
        time.sleep(0.02)
    found = subprocess.run(
        ["ps", "-ww", "--ppid", str(launched.pid), "-o", "pid=,args="],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    [line] = [x for x in found.stdout.splitlines() if "--process_id=1" in x]
    os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.mark.slow
def test_two_processes_and_then_one_train_like_one(tmp_path, monkeypatch):
    """2 processes x 4 devices, killed, then 1 x 4, learn what one device does."""
    run = small.changed(
        small.RUN,
        num_steps=100_000,
        log_every_steps=1,
        eval_every_steps=3,
        model__vocab_size=272,
        optim__schedule="constant",
        checkpoint__every_steps=4,
        checkpoint__keep_every_steps=4,
        data=DataConfig(
            source="files",
            path=str(pathlib.Path(json.__file__).parent / "*.py"),
            validation_fraction=0.2,
            cache_dir=str(tmp_path / "cache"),
        ),
    )
    two, one = tmp_path / "work dir's two", tmp_path / "one"  # quoting matters
    path = tmp_path / "two.json"
    path.write_text(
        config.to_json(small.changed(run, mesh=MeshConfig(data=-1, tensor=2)))
    )
    words = [f"--config={path}", f"--workdir={two}", "--json"]
    with subprocess.Popen(
        [*LOCAL, "--processes=2", "--devices=4", "--", *words],
        env=ENV, stderr=subprocess.PIPE, text=True,
    ) as launched:  # fmt: skip
        kill_one(launched, two, at=4)
        _, said = launched.communicate(timeout=60)
    # Also where the shell sees the end of the one that was killed first.
    assert launched.returncode == 75
    assert "process 1 on " in said
    assert "ended without a word" in said
    saved = [int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit()]
    steps = max(saved) + 2
    resumed = f"--config.num_steps={steps}"
    done = launch("--processes=1", "--devices=4", "--", *words, resumed)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :])["step"] == steps
    run = small.changed(run, num_steps=steps, mesh=MeshConfig(data=1))
    small.Taken(run).stand_in(monkeypatch)
    train.train(run, str(one))
    assert records(two, "batch_hash") == records(one, "batch_hash")
    for name in ("loss", "eval_loss"):
        found, straight = records(two, name), records(one, name)
        assert found.keys() == straight.keys()
        np.testing.assert_allclose(
            [found[s] for s in straight], list(straight.values()), rtol=1e-5
        )


@contextlib.contextmanager
def pair(*command, **variables):
    """Starts a command as the two processes of a run, and ends what is left of them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
    env = ENV | {"JAX_NUM_CPU_DEVICES": "1"} | variables
    pipe = subprocess.PIPE
    with contextlib.ExitStack() as stack:
        found = []
        for i in range(2):
            words = [f"--coordinator={where}", "--num_processes=2", f"--process_id={i}"]
            process = subprocess.Popen(
                [sys.executable, *command, *words, f"--config.seed={i}"],
                env=env, stdout=pipe, stderr=pipe, text=True,
            )  # fmt: skip
            stack.enter_context(process)
            stack.callback(process.kill)
            found.append(process)
        yield found


def test_processes_that_differ_end_and_say_in_what(tmp_path):
    (tmp_path / "run.json").write_text(config.to_json(small.RUN))
    words = [f"--config={tmp_path / 'run.json'}", f"--workdir={tmp_path / 'run'}"]
    with pair("-m", "scaletrain.main", "train", *words) as processes:
        for process in processes:
            _, said = process.communicate(timeout=120)
            assert process.returncode == 2
            assert "the processes do not agree:\n  process 1 on " in said
            assert ": config.seed is 1, in process 0 0\nstart all of them" in said
    assert not (tmp_path / "run" / "checkpoints").exists()


# Asks whether to stop, as between steps, until it is so; then hangs.
ASKING = """\
import sys, time
from scaletrain import cluster
from scaletrain.commands import line
from scaletrain.cluster import signals
signals.catch()
cluster.join(line.read(["train", *sys.argv[1:-1]])[0])
print("joined", flush=True)
asked = 1
while (since := cluster.stopped_since()) is None:
    time.sleep(0.01)
    asked += 1
print(asked, since, flush=True)
time.sleep(100)
"""


def test_a_signal_to_one_stops_all_at_one_step_and_a_second_at_once(tmp_path):
    (tmp_path / "run.json").write_text(config.to_json(small.RUN))
    words = [f"--config={tmp_path / 'run.json'}", f"--workdir={tmp_path / 'run'}"]
    with pair("-c", ASKING, *words) as (first, second):
        for process in (first, second):
            assert process.stdout.readline() == "joined\n"
        sent = time.monotonic()
        second.send_signal(signal.SIGTERM)
        answers = [p.stdout.readline().split() for p in (first, second)]
        assert answers[0][0] == answers[1][0]
        for _, since in answers:
            assert abs(float(since) - sent) < 1
        second.send_signal(signal.SIGTERM)
        assert second.wait(20) == -signal.SIGTERM
        assert first.wait(20) == 75
        assert "process 1 on " in first.stderr.read()


COMPILING = """\
import sys
from scaletrain import cluster
from scaletrain.commands import line
cluster.join(line.read(["train", *sys.argv[1:-1]])[0])
import jax
jax.jit(lambda x: x + 1)(0.0)
cluster.wait("compiled")
cluster.leave(0)
"""


def test_cpus_of_several_processes_keep_no_executables(tmp_path):
    """Their collectives would mix once one process has read its executable back."""
    (tmp_path / "run.json").write_text(config.to_json(small.RUN))
    words = [f"--config={tmp_path / 'run.json'}", f"--workdir={tmp_path / 'run'}"]
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with pair("-c", COMPILING, *words, **cache) as processes:
        for process in processes:
            assert process.wait(60) == 0, process.stderr.read()
    assert not [*tmp_path.glob("compiled/*")]


def test_a_failing_process_ends_the_launch(tmp_path):
    done = launch("--", "--config=nowhere.py", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "--config=nowhere.py; no such file" in done.stderr
    done = launch("--bogus=1")
    assert done.returncode == 2
    assert "--bogus=1; unknown" in done.stderr
