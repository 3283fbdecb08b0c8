"""Checkpoints on disks that fail, change and fill up."""

import contextlib
import json
import pathlib
import shutil
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
import small

from scaletrain import workdir
from scaletrain.checkpoint import Checkpoints
from scaletrain.errors import CheckpointError
from scaletrain.manifest import Manifest
from scaletrain.retention import Retention
from scaletrain.step import TrainState

# Orbax's threads of a save that failed end when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
RUN = small.changed(small.RUN, num_steps=100, checkpoint__every_steps=1)


def state(value, size=1000):
    noise = jax.random.normal(jax.random.key(value), size)  # nothing to compress
    return TrainState(
        step=jnp.int32(value),
        params={"one": noise.at[0].set(value), "two": jnp.zeros(3)},
        frozen={},
        opt_state={"m": noise},
        key=jnp.zeros(2, jnp.uint32),
        amax={},
    )


@pytest.fixture
def told():
    return []


@contextlib.contextmanager
def opened(path, told, **settings):
    run = small.changed(RUN, **settings)
    with contextlib.closing(Checkpoints(path, run, say=told.append)) as found:
        yield found


def saved(path, *steps, **settings):
    with opened(path, [], **settings) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), "text", [])
        checkpoints.finish()
    return path / "checkpoints"


def largest(folder):
    """Returns the file of a step that holds most of its bytes."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".json"]
    return max(files, key=lambda path: path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def damages():
    return [
        pytest.param(
            lambda f: flip(largest(f)), "its bytes have changed", id="flipped"
        ),
        pytest.param(lambda f: cut(largest(f)), "bytes instead of", id="truncated"),
        pytest.param(lambda f: largest(f).unlink(), ": missing", id="missing file"),
        pytest.param(
            lambda f: flip(f / "manifest.json"), "manifest.json", id="manifest"
        ),
        pytest.param(
            lambda f: (f / "manifest.json").unlink(), "manifest.json", id="no manifest"
        ),
    ]


@pytest.mark.parametrize(("harm", "words"), damages())
def test_damage_is_found_and_named(tmp_path, told, harm, words):
    folder = saved(tmp_path, 1, 2)
    name = largest(folder / "2").relative_to(folder / "2").as_posix()
    harm(folder / "2")
    with (
        opened(tmp_path, told) as checkpoints,
        pytest.raises(CheckpointError, match="2 is damaged") as raised,
    ):
        checkpoints.sound()
    assert words in str(raised.value)
    assert "manifest.json" in str(raised.value) or name in str(raised.value)
    assert "checkpoint.on_damage=previous" in str(raised.value)
    assert raised.value.exit_code == 2
    assert (folder / "2").is_dir()


def test_the_previous_step_is_used_where_that_is_asked_for(tmp_path, told):
    folder = saved(tmp_path, 1, 2, 3)
    flip(largest(folder / "3"))
    cut(largest(folder / "2"))
    with opened(tmp_path, told, checkpoint__on_damage="previous") as checkpoints:
        assert checkpoints.sound() == 1
        found = checkpoints.restore(1, state(0))
        assert float(found.params["one"][0]) == 1
        checkpoints.save(2, state(2), "text", [])
        checkpoints.finish()
        assert checkpoints.sound() == 2
    assert len(told) == 2
    assert "3 is damaged" in told[0]
    assert (folder / "3.damaged").is_dir()
    assert (folder / "2.damaged").is_dir()


def test_a_run_does_not_start_over_when_all_is_damaged(tmp_path, told):
    folder = saved(tmp_path, 1)
    flip(largest(folder / "1"))
    with (
        opened(tmp_path, told, checkpoint__on_damage="previous") as checkpoints,
        pytest.raises(CheckpointError, match="every checkpoint is damaged"),
    ):
        checkpoints.sound()


def test_a_missing_leaf_is_named(tmp_path, told):
    saved(tmp_path, 1)
    wanted = state(0)
    wanted.params["three"] = jnp.zeros(3)
    with (
        opened(tmp_path, told) as checkpoints,
        pytest.raises(CheckpointError, match="three: missing"),
    ):
        checkpoints.restore(1, wanted)


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_a_full_disk_is_told_of_and_may_be_emptied(tmp_path, told):
    with (
        small_disk(tmp_path / "disk", "3m") as disk,
        opened(disk, told, checkpoint__keep=1, checkpoint__max_failed_saves=2) as some,
    ):
        some.save(1, state(1), "text", [])
        some.finish()
        filler = disk / "filler"
        filler.write_bytes(bytes(2_900_000 - 100_000))
        large = state(2, 200_000)
        some.save(2, large, "text", [])
        some.save(3, large, "text", [])  # hears of the one before
        assert len(told) == 1
        assert "No space left" in told[0]
        assert "Training goes on (1 of 2 failures)" in told[0]
        assert some.latest() in (1, 3)  # Orbax counts what it has begun
        filler.unlink()
        some.save(4, state(4), "text", [], needed=True)
        assert some.latest() == 4
        assert [p.name for p in (disk / "checkpoints").iterdir()] == ["4"]


def save_again(checkpoints):
    for step in (3, 4):
        checkpoints.save(step, state(step), "text", [])


def test_too_many_failed_saves_end_a_run(tmp_path, told):
    with small_disk(tmp_path / "disk", "1m") as disk:
        saved(disk, 1)
        words = ["mount", "-o", "remount,ro", str(disk)]
        with opened(disk, told, checkpoint__max_failed_saves=1) as checkpoints:
            subprocess.run(words, check=True)
            try:
                checkpoints.save(2, state(2), "text", [])
                with pytest.raises(CheckpointError, match="Read-only") as raised:
                    save_again(checkpoints)
            finally:
                subprocess.run([*words[:2], "remount,rw", str(disk)], check=True)
        assert raised.value.exit_code == 1
        assert "newest whole step: 1" in str(raised.value)
        # None that the process would wait for at its end.
        kinds = {type(thread).__name__ for thread in threading.enumerate()}
        assert "_SignalingThread" not in kinds
        with opened(disk, told) as checkpoints:
            assert checkpoints.sound() == 1


def test_a_failed_save_removes_no_step(tmp_path, told, monkeypatch):
    """Also where the loop hears of the failure before Orbax's own thread does."""
    saved(tmp_path, 1)
    heard = ocp.AsyncCheckpointer.wait_until_finished

    def fail(self, folder):
        raise OSError(5, "Input/output error")

    def hears_late(self):
        time.sleep(0.2)
        heard(self)

    monkeypatch.setattr(Manifest, "write", fail)
    monkeypatch.setattr(ocp.AsyncCheckpointer, "wait_until_finished", hears_late)
    settings = {"checkpoint__keep": 1, "checkpoint__max_failed_saves": 1}
    with opened(tmp_path, told, **settings) as checkpoints:
        checkpoints.save(2, state(2), "text", [])
        while not told:
            checkpoints.check()
            time.sleep(0.01)
        assert checkpoints.latest() == 1
    assert (tmp_path / "checkpoints" / "1").is_dir()


def test_a_needed_save_must_not_fail(tmp_path, told):
    with small_disk(tmp_path / "disk", "500k") as disk:
        saved(disk, 1)
        with (
            opened(disk, told) as checkpoints,
            pytest.raises(CheckpointError, match="No space left"),
        ):
            checkpoints.save(2, state(2, 200_000), "text", [], needed=True)
        with opened(disk, told) as checkpoints:
            assert checkpoints.sound() == 1
            assert [p.name for p in (disk / "checkpoints").iterdir()] == ["1"]


def test_a_vanished_folder_is_made_again(tmp_path, told):
    with opened(tmp_path, told) as checkpoints:
        checkpoints.save(1, state(1), "text", [])
        checkpoints.finish()
        shutil.rmtree(tmp_path / "checkpoints")
        checkpoints.save(2, state(2), "text", [])
        checkpoints.save(3, state(3), "text", [], needed=True)
    with opened(tmp_path, told) as checkpoints:
        assert checkpoints.sound() == 3


def test_temporary_steps_go_when_a_newer_one_is_whole():
    run = small.changed(
        RUN, checkpoint__every_steps=10, checkpoint__keep=2, num_steps=35
    )
    kept = Retention(run).kept
    assert kept([0, 10, 13]) == {0, 10, 13}
    assert kept([0, 10, 13, 17, 20]) == {0, 10, 20}
    assert kept([10, 20, 30, 33]) == {0, 20, 30, 33}
    assert kept([20, 30, 33, 35]) == {0, 30, 35}
    all_alike = Retention(small.changed(run, checkpoint__every_steps=0)).kept
    assert all_alike([3, 5, 8]) == {0, 5, 8}


def test_a_workdir_holds_one_run(tmp_path):
    code = (
        "import pathlib, sys; from scaletrain import workdir\n"
        f"with workdir.held(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match=f"process {other.pid} on .* trains"),
            workdir.held(tmp_path),
        ):
            pass
        other.kill()
    with workdir.held(tmp_path):  # the kernel let go
        assert json.loads((tmp_path / "lock").read_text())["pid"] != other.pid


def test_imports_have_manifests(tmp_path):
    with opened(tmp_path, []) as checkpoints:
        checkpoints.save_weights({"a/b": jnp.arange(5, dtype=jnp.bfloat16)})
        assert checkpoints.sound() == 0
        assert checkpoints.dtypes(0) == {"a/b": jnp.bfloat16}
    assert jax.process_count() == 1
    assert pathlib.Path(tmp_path / "checkpoints" / "0" / "manifest.json").is_file()
