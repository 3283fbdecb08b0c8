"""Whole runs: what they leave, and that a resumed one is the uninterrupted one."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small

from scaletrain import compilation, config, evaluate, main, train
from scaletrain.config import DataConfig, MeshConfig
from scaletrain.errors import (
    CheckpointError,
    ConfigError,
    DivergedError,
    Interrupted,
)

REPOSITORY = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """A run over real text: this repository's own tests."""
    cache = tmp_path_factory.mktemp("cache")
    return small.changed(
        small.RUN,
        num_steps=30,
        log_every_steps=1,
        model__vocab_size=272,
        mesh__data=1,
        data=DataConfig(
            source="files",
            path=str(REPOSITORY / "tests" / "*.py"),
            validation_fraction=0.2,
            cache_dir=str(cache),
        ),
        checkpoint__every_steps=7,
        eval__num_batches=2,
    )


@pytest.fixture(scope="session")
def brief(text_run):
    """Runs in this process: however long they are, their step is compiled once."""
    return small.changed(text_run, num_steps=1, optim__schedule="constant")


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Runs see one device unless they ask for more."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    whole = train.mesh.build
    monkeypatch.setattr(
        train.mesh, "build", lambda c: whole(c, jax.devices()[: c.num_devices])
    )


def records(workdir):
    lines = (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def steps(workdir, name):
    return {r["step"]: r[name] for r in records(workdir) if name in r}


@pytest.fixture(scope="module")
def straight(text_run, tmp_path_factory):
    """The uninterrupted run, in a process like those that are interrupted.

    Sums on CPU depend on how many threads the process cuts them for, so bits are
    compared between processes of the same number of devices.
    """
    workdir = tmp_path_factory.mktemp("straight") / "run"
    line, env = command(text_run, workdir, workdir.parent)
    subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    return workdir


def test_a_run_without_validation_says_so(brief, tmp_path):
    run = small.changed(brief, data__validation_fraction=0.0, eval__num_batches=0)
    found = train.train(run, str(tmp_path))
    assert evaluate.in_words(found) == "has no sequence"


def test_a_run_leaves_what_is_promised(straight, text_run):
    assert config.from_json((straight / "config.json").read_text()) == text_run
    names = {p.name for p in straight.iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "tokenizer"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    kept = sorted(int(p.name) for p in (straight / "checkpoints").iterdir())
    assert kept == [21, 28, 30]
    record = records(straight)[5]
    assert record["step"] == 6
    assert record["tokens"] == 6 * 16 * 32
    assert record["mfu"] is None
    assert record["tokens_per_s"] == pytest.approx(16 * 32 / record["step_time_s"])
    last = next(r for r in records(straight) if "eval_loss" in r)
    assert last["eval_bits_per_byte"] < 8
    assert last["eval_bits_per_byte_order0"] > last["eval_bits_per_byte_order1"]
    assert steps(straight, "loss")[30] < steps(straight, "loss")[1]


@pytest.mark.parametrize("went_back", [False, True])
def test_checkpoints_that_are_gone_are_no_reason_to_begin_anew(
    straight, text_run, tmp_path, went_back
):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    if went_back:  # a run that did has the step it went back to
        gone = json.dumps([{"step": 21, "left_out": 4}])
        (workdir / "rollbacks.json").write_text(gone)
    (workdir / "checkpoints").rename(tmp_path / "elsewhere")
    before = (workdir / "metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="of step 30 saved.*is it mounted"):
        train.train(text_run, str(workdir))
    assert (workdir / "metrics.jsonl").read_bytes() == before
    assert not (workdir / "checkpoints").exists()  # one moved back would end up inside


def command(run, workdir, tmp_path, devices=1):
    """Returns the command line and environment that train `run` in a process."""
    path = tmp_path / "run.json"
    path.write_text(config.to_json(run))
    line = [sys.executable, "-m", "scaletrain.main", "train"]
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # as in this process
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # these steps are small
        "JAX_DEBUG_LOG_MODULES": "jax._src.compiler",  # tells what was in the cache
    }
    return [*line, f"--config={path}", f"--workdir={workdir}"], env


def start_and_signal(run, workdir, tmp_path, at, number):
    """Starts a run and signals it once it has taken `at` steps."""
    line, env = command(run, workdir, tmp_path)
    metrics = pathlib.Path(workdir) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    with subprocess.Popen(line, env=env, stderr=subprocess.PIPE, text=True) as process:
        while time.monotonic() < deadline and process.poll() is None:
            if metrics.exists() and metrics.read_text().count('"loss"') >= at:
                break
            time.sleep(0.01)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    return process.returncode, said


@pytest.fixture(scope="module")
def killed(text_run, tmp_path_factory):
    """What a run leaves that is killed half-way."""
    workdir = tmp_path_factory.mktemp("killed") / "run"
    code, _ = start_and_signal(text_run, workdir, workdir.parent, 15, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert max(steps(workdir, "loss")) < 30
    return workdir


def test_killed_and_resumed_equals_straight_to_the_last_bit(
    straight, killed, text_run, tmp_path
):
    workdir = tmp_path / "resumed"
    shutil.copytree(killed, workdir)
    line, env = command(text_run, workdir, tmp_path)
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert "resuming from step " in done.stderr
    assert "compilation cache hit for 'jit_train_step'" in done.stderr
    assert steps(workdir, "loss") == steps(straight, "loss")
    assert steps(workdir, "batch_hash") == steps(straight, "batch_hash")
    assert steps(workdir, "grad_norm") == steps(straight, "grad_norm")


def test_a_spoilt_executable_is_compiled_again(straight, text_run, tmp_path):
    workdir = tmp_path / "spoilt"
    shutil.copytree(straight, workdir)
    (kept,) = (workdir / "compiled").glob("jit_train_step-*-cache")
    kept.write_bytes(kept.read_bytes()[: kept.stat().st_size // 2])
    line, env = command(text_run, workdir, tmp_path)
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert "Error reading persistent compilation cache entry" in done.stderr
    assert "compilation cache hit for 'jit_train_step'" not in done.stderr
    assert done.stdout.startswith("step 30: validation")


def test_resumed_on_eight_devices_equals_one(straight, killed, text_run, tmp_path):
    workdir = tmp_path / "moved"
    shutil.copytree(killed, workdir)
    moved = small.changed(text_run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    line, env = command(moved, workdir, tmp_path, devices=8)
    done = subprocess.run(line, env=env, capture_output=True, text=True, check=True)
    assert "mesh.fsdp: 1 then, 2 now" in done.stderr
    assert steps(workdir, "batch_hash") == steps(straight, "batch_hash")
    one, eight = steps(straight, "loss"), steps(workdir, "loss")
    np.testing.assert_allclose(
        [eight[s] for s in one], [one[s] for s in one], rtol=1e-5
    )


def test_sigterm_saves_and_says_start_again(straight, text_run, tmp_path):
    workdir = tmp_path / "stopped"
    run = dataclasses.replace(text_run, num_steps=3000)
    code, said = start_and_signal(run, workdir, tmp_path, 9, signal.SIGTERM)
    assert code == Interrupted.exit_code == 75
    assert "s after it; the same command goes on from there" in said
    assert max(steps(workdir, "stop_to_saved_s").values()) < 60
    last = max(steps(workdir, "loss"))
    assert (workdir / "checkpoints" / str(last)).is_dir()


def test_finished_runs_only_evaluate(straight, text_run):
    before = steps(straight, "loss")
    found = train.train(text_run, str(straight))
    assert found["step"] == 30
    assert steps(straight, "loss") == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model__d_ff": 96}, "model.d_ff: 64 then, 96 now"),
        ({"seed": 5, "seq_len": 16}, "(?s)seq_len: 32 then, 16 now.*seed: 0 then"),
        ({"optim__name": "lion"}, "optim.name: 'adamw' then, 'lion' now"),
    ],
)
def test_another_model_is_refused(straight, text_run, settings, words):
    with pytest.raises(CheckpointError, match=words):
        train.train(small.changed(text_run, num_steps=31, **settings), str(straight))


def attempts(workdir):
    return json.loads((workdir / "attempts.json").read_text())


def test_a_refused_start_is_no_attempt_and_a_run_that_is_over_is_not_down(
    brief, tmp_path
):
    train.train(brief, str(tmp_path))
    with pytest.raises(CheckpointError, match="seed: 0 then, 5 now"):
        train.train(small.changed(brief, num_steps=2, seed=5), str(tmp_path))
    assert len(attempts(tmp_path)) == 1
    train.train(small.changed(brief, num_steps=2), str(tmp_path))
    first, second = attempts(tmp_path)
    assert "init" in first["phases"]
    assert "restore" not in first["phases"]
    assert "restore" in second["phases"]
    assert "init" not in second["phases"]
    account = [r for r in records(tmp_path) if "goodput" in r][-1]
    assert account["attempts"] == 2
    assert "down" not in account["seconds_by_cause"]


def test_fewer_steps_than_were_taken_are_nothing_to_do(
    brief, tmp_path, monkeypatch, capsys
):
    """Nothing is compiled or written, and the numbers are those known already."""
    found = train.train(small.changed(brief, num_steps=3), str(tmp_path))
    names = ("config.json", "metrics.jsonl", "attempts.json")
    before = {name: (tmp_path / name).read_bytes() for name in names}
    monkeypatch.delattr(compilation, "compiled")
    fewer = small.changed(brief, num_steps=2, eval__num_batches=1)
    assert train.train(fewer, str(tmp_path)) == found
    assert "num_steps=2; nothing to do: " in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    lines = before["metrics.jsonl"].splitlines(keepends=True)
    rest = b"".join(line for line in lines if b"eval_loss" not in line)
    (tmp_path / "metrics.jsonl").write_bytes(rest)
    found = train.train(fewer, str(tmp_path))
    assert found == {"step": 3, "evaluated": False}
    assert evaluate.in_words(found) == "was not evaluated"


def test_another_corpus_is_refused(brief, tmp_path):
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"document {i} " * 50)
    run = small.changed(brief, data__path=str(corpus / "*.txt"))
    train.train(run, str(tmp_path / "run"))
    (corpus / "3.txt").write_text("something else")
    with pytest.raises(CheckpointError, match="the corpus or its tokenizer is not"):
        train.train(dataclasses.replace(run, num_steps=2), str(tmp_path / "run"))


def test_a_run_goes_on_where_its_corpus_was_moved_to(brief, tmp_path, capfd):
    corpus, moved = tmp_path / "corpus", tmp_path / "moved"
    corpus.mkdir()
    for i in range(20):
        (corpus / f"{i}.txt").write_text(f"document {i} " * 50)
    run = small.changed(brief, data__path=f"{corpus}/*.txt")
    train.train(run, str(tmp_path / "run"))
    corpus.rename(moved)
    run = small.changed(run, data__path=f"{moved}/*.txt", num_steps=2)
    train.train(run, str(tmp_path / "run"))
    told = capfd.readouterr().err
    change = f"data.path: '{corpus}/*.txt' then, '{moved}/*.txt' now"
    assert f"changed since step 1: {change}" in told
    assert "resuming from step 1" in told
    (moved / "3.txt").write_text("something else")
    run = small.changed(run, data__path=f"{tmp_path}/m*/*.txt", num_steps=3)
    with pytest.raises(CheckpointError, match=r"(?s)data.path: .* the corpus or its"):
        train.train(run, str(tmp_path / "run"))


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_a_checkpoint_must_match_leaf_by_leaf(brief, tmp_path, monkeypatch, change):
    """That it does not is told before the step is compiled."""
    from scaletrain import compilation
    from scaletrain.checkpoint import reader

    whole, shorter = reader.flat, jax.numpy.ones(31)

    def altered(tree):
        flat = whole(tree)
        if "norm/scale" in flat:
            if change == "missing":
                del flat["norm/scale"]
            elif change == "extra":
                flat["surplus"] = flat["norm/scale"]
            else:
                flat["norm/scale"] = shorter
        return flat

    with monkeypatch.context() as patch:
        patch.setattr(reader, "flat", altered)
        train.train(brief, str(tmp_path))
    words = {
        "missing": "norm/scale: missing",
        "extra": "surplus: not in this model",
        "shape": r"norm/scale: \(31,\) stored, \(32,\) wanted",
    }
    monkeypatch.delattr(compilation, "compiled")
    with pytest.raises(CheckpointError, match=words[change]):
        train.train(dataclasses.replace(brief, num_steps=2), str(tmp_path))


def test_a_half_written_step_is_not_there(brief, tmp_path):
    """A step directory without its final name is ignored and cleared away."""
    run = dataclasses.replace(brief, num_steps=7)
    train.train(run, str(tmp_path))
    folder = tmp_path / "checkpoints"
    (folder / "7").rename(folder / "9.orbax-checkpoint-tmp")
    (tmp_path / "metrics.jsonl").unlink()  # it tells that the save ended
    train.train(run, str(tmp_path))
    assert [p.name for p in folder.iterdir()] == ["7"]


def test_a_failed_save_fails_the_run(brief, tmp_path, monkeypatch):
    from scaletrain import checkpoint

    def fail(self, *, together):
        self._fail(OSError("no space left on device"))

    monkeypatch.setattr(checkpoint.Store, "check", fail)
    run = small.changed(brief, num_steps=30, checkpoint__max_failed_saves=2)
    with pytest.raises(CheckpointError, match="no space left on device") as caught:
        train.train(run, str(tmp_path))
    assert caught.value.exit_code == 1
    assert max(steps(tmp_path, "loss")) == 2


def test_numbers_that_stay_broken_end_the_run(text_run, tmp_path):
    run = small.changed(
        text_run, optim__learning_rate=1e30, optim__name="sgd", optim__b1=0.0,
        optim__clip_norm=0.0, optim__max_skipped_steps=3,
    )  # fmt: skip
    with pytest.raises(
        DivergedError,
        match="no update for 3 steps in a row.*; no checkpoint from before",
    ):
        train.train(run, str(tmp_path))
    assert steps(tmp_path, "loss")[4] is None
    assert list(steps(tmp_path, "skip_step")) == [2, 3, 4]
    assert steps(tmp_path, "skipped")[max(steps(tmp_path, "skipped"))] >= 2


def test_multi_steps_reads_the_same_batches(straight, text_run, tmp_path):
    run = small.changed(
        text_run, num_steps=4, accumulate_steps=4, optim__accumulate="multi_steps"
    )
    train.train(run, str(tmp_path))
    whole = steps(straight, "batch_hash")
    assert steps(tmp_path, "batch_hash") == {s: whole[s] for s in range(1, 5)}


def test_eval_and_generate_read_what_a_run_left(
    straight, text_run, tmp_path, monkeypatch, capsys
):
    """From the workdir alone, on the mesh that is here, without writing to it."""
    before = sorted(str(p) for p in straight.rglob("*"))

    def ask(*args):
        _, env = command(text_run, straight, tmp_path, devices=2)
        line = [sys.executable, "-m", "scaletrain.main", *args, f"--workdir={straight}"]
        return subprocess.run(
            [*line, "--json"], env=env, capture_output=True, text=True, check=False
        )

    def ask_here(*args):
        """Returns the exit code and what was said, without a process."""
        argv = ["scaletrain", *args, f"--workdir={straight}", "--json"]
        monkeypatch.setattr(sys, "argv", argv)
        try:
            main.main()
        except SystemExit as err:
            return err.code, capsys.readouterr()
        return 0, capsys.readouterr()

    # What main sets for a process.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    found = json.loads(ask("eval").stdout)
    assert found["loss"] == pytest.approx(steps(straight, "eval_loss")[30], rel=1e-5)
    code, older = ask_here("eval", "--step=21", "--split=train")
    assert code == 0
    assert json.loads(older.out)["step"] == 21
    code, gone = ask_here("eval", "--step=5")
    assert code == 2
    assert "--step=5;" in gone.err
    assert "it has 21, 28, 30" in gone.err
    texts = json.loads(ask("generate", "--prompt=def ", "--prompt=x").stdout)
    assert [t["prompt"] for t in texts] == ["def ", "x"]
    assert all(t["text"] for t in texts)
    assert sorted(str(p) for p in straight.rglob("*")) == before
