"""The launch scripts, with real processes."""

import json
import os
import pathlib
import signal
import subprocess
import time

import numpy as np
import small

from scaletrain import config
from scaletrain.config import DataConfig, MeshConfig

ROOT = pathlib.Path(__file__).parent.parent
LOCAL = ["bash", str(ROOT / "launch" / "local.sh")]


def launch(*args, **env):
    return subprocess.run(
        [*LOCAL, *args],
        env=os.environ | env,
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


def test_two_processes_and_then_one_train_like_one(tmp_path):
    """2 processes x 4 devices, killed, then 1 x 4, learn what 1 x 1 does."""
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
            path=str(ROOT / "tests" / "*.py"),
            validation_fraction=0.2,
            cache_dir=str(tmp_path / "cache"),
        ),
    )
    meshes = {"two": MeshConfig(data=-1, tensor=2), "one": MeshConfig(data=-1)}
    words = {}
    for name, mesh in meshes.items():
        path = tmp_path / f"{name}.json"
        path.write_text(config.to_json(small.changed(run, mesh=mesh)))
        workdir = tmp_path / f"work dir's {name}"  # quoting matters
        words[name] = [f"--config={path}", f"--workdir={workdir}", "--json"]
    two, one = (tmp_path / f"work dir's {name}" for name in ("two", "one"))
    with subprocess.Popen(
        [*LOCAL, "--processes=2", "--devices=4", "--", *words["two"]],
        stderr=subprocess.PIPE, text=True,
    ) as launched:  # fmt: skip
        kill_one(launched, two, at=4)
        _, said = launched.communicate(timeout=60)
    # Whichever end the shell sees first: of the one killed, or of the one that says so.
    assert launched.returncode in (75, 128 + signal.SIGKILL)
    assert "process 1 on " in said
    assert "ended without a word" in said
    saved = [int(p.name) for p in (two / "checkpoints").iterdir() if p.name.isdigit()]
    steps = max(saved) + 2
    for name, devices in (("two", 4), ("one", 1)):
        done = launch(
            "--processes=1", f"--devices={devices}", "--", *words[name],
            f"--config.num_steps={steps}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout[done.stdout.index("{") :])["step"] == steps
    assert records(two, "batch_hash") == records(one, "batch_hash")
    for name in ("loss", "eval_loss"):
        found, straight = records(two, name), records(one, name)
        assert found.keys() == straight.keys()
        np.testing.assert_allclose(
            [found[s] for s in straight], list(straight.values()), rtol=1e-5
        )


def test_a_failing_process_ends_the_launch(tmp_path):
    done = launch("--", "--config=nowhere.py", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "--config=nowhere.py; no such file" in done.stderr
    done = launch("--bogus=1")
    assert done.returncode == 2
    assert "--bogus=1; unknown" in done.stderr
