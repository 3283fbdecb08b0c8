"""The launch scripts, with real processes."""

import json
import os
import pathlib
import subprocess

import numpy as np
import small

from scaletrain import config
from scaletrain.config import DataConfig, MeshConfig

ROOT = pathlib.Path(__file__).parent.parent


def launch(*args, **env):
    return subprocess.run(
        ["bash", str(ROOT / "launch" / "local.sh"), *args],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_two_processes_train_like_one(tmp_path):
    """2 processes x 4 devices read and learn what 1 process x 1 device does."""
    run = small.changed(
        small.RUN,
        num_steps=6,
        log_every_steps=1,
        model__vocab_size=272,
        checkpoint__every_steps=4,
        data=DataConfig(
            source="files",
            path=str(ROOT / "tests" / "*.py"),
            validation_fraction=0.2,
            cache_dir=str(tmp_path / "cache"),
        ),
    )
    found = {}
    for name, mesh, words in (
        ("two", MeshConfig(data=-1, tensor=2), ("--processes=2", "--devices=4")),
        ("one", MeshConfig(data=-1), ("--processes=1", "--devices=1")),
    ):
        path = tmp_path / f"{name}.json"
        path.write_text(config.to_json(small.changed(run, mesh=mesh)))
        workdir = tmp_path / f"work dir's {name}"  # quoting matters
        done = launch(
            *words, "--", f"--config={path}", f"--workdir={workdir}", "--json"
        )
        assert done.returncode == 0, done.stderr
        lines = (workdir / "metrics.jsonl").read_text().splitlines()
        found[name] = [json.loads(line) for line in lines]
        # Gloo, in C++, greets on standard output before the result comes.
        result = done.stdout[done.stdout.index("{") :]
        assert json.loads(result)["step"] == 6
    one, two = ([r["loss"] for r in found[n] if "loss" in r] for n in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=1e-5)
    one, two = (
        [r["batch_hash"] for r in found[n] if "loss" in r] for n in ("one", "two")
    )
    assert one == two
    np.testing.assert_allclose(
        found["two"][-1]["eval_loss"], found["one"][-1]["eval_loss"], rtol=1e-5
    )


def test_a_failing_process_ends_the_launch(tmp_path):
    done = launch("--", "--config=nowhere.py", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "--config=nowhere.py; no such file" in done.stderr
    done = launch("--bogus=1")
    assert done.returncode == 2
    assert "--bogus=1; unknown" in done.stderr
