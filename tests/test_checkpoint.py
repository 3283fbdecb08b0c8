"""Checkpoints on disks that fail, change and fill up."""

import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import pytest
import small
import tensorstore
from jax.sharding import NamedSharding

from scaletrain import config, lock, main, train
from scaletrain.checkpoint import Store, manifest, writer
from scaletrain.checkpoint.manifest import UNFINISHED, Manifest
from scaletrain.checkpoint.retention import retained_steps
from scaletrain.errors import CheckpointError
from scaletrain.program import TrainState
from scaletrain.workdir import Workdir

# Orbax's threads of a save that failed end when they are collected.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]
FULL = "No space left on device"
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
    with contextlib.closing(Store(Workdir(path), run, say=told.append)) as found:
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
            lambda f: flip(largest(f)), ": bytes between 0 and ", id="flipped"
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
        checkpoints.newest_undamaged()
    assert words in str(raised.value)
    assert "manifest.json" in str(raised.value) or name in str(raised.value)
    assert "checkpoint.on_damage=previous" in str(raised.value)
    assert raised.value.exit_code == 2
    assert (folder / "2").is_dir()


def test_the_leaves_in_damaged_bytes_are_named(tmp_path, told, monkeypatch):
    block = 4096
    monkeypatch.setattr(manifest, "_BLOCK_BYTES", block)
    noise = {f"a/{i}/b": jax.random.normal(jax.random.key(i), 2000) for i in range(20)}
    with opened(tmp_path, told) as checkpoints:
        checkpoints.save_weights(noise)
        folder = tmp_path / "checkpoints" / "0"
        path = largest(folder)
        content = bytearray(path.read_bytes())
        for start in (0, len(content) // 2 // block * block):
            hurt = content[:start] + bytes(block) + content[start + block :]
            path.write_bytes(hurt)
            with pytest.raises(CheckpointError) as raised:
                checkpoints.verify(0)
            end = min(start + block, len(content))
            changed = f"bytes between {start:,} and {end:,} have changed"
            words = rf"/{path.name}: {changed}; of (.*)"
            [leaves] = re.findall(words, str(raised.value))
            assert leaves.split(", ") == unreadable(folder / "params", noise)
        path.unlink()
        gone = unreadable(folder / "params", noise)
        listed = ", ".join(gone[:8]) + (", \\.\\.\\." if gone[8:] else "")
        with pytest.raises(CheckpointError, match=f": missing; of {listed}\n"):
            checkpoints.verify(0)


def unreadable(folder, leaves):
    """Returns which leaves TensorStore does not read as they are."""
    base = {"driver": "ocdbt", "base": f"file://{folder}/"}
    found = []
    for path, leaf in leaves.items():
        spec = {"driver": "zarr", "kvstore": base | {"path": path}}
        try:
            same = (tensorstore.open(spec).result().read().result() == leaf).all()
        except ValueError:  # it cannot be decompressed
            same = False
        if not same:
            found.append(path)
    return sorted(found)


def test_each_process_sums_what_it_wrote(tmp_path, told, monkeypatch):
    """Before Orbax merges it; that leaves the files as they are."""
    found, sums = [], manifest._sums
    monkeypatch.setattr(
        manifest, "_sums", lambda *args: found.append(sums(*args)) or found[-1]
    )
    folder = saved(tmp_path, 1)
    own, rest = found
    assert own.keys() == {
        path.relative_to(folder / "1").as_posix()
        for path in (folder / "1").glob("*/ocdbt.process_0/**/*")
        if path.is_file()
    }
    whole = Manifest.read(folder / "1")
    assert whole.files == own | rest
    assert not own.keys() & rest.keys()
    assert whole.damage(folder / "1", 0, 1) == []


def test_the_previous_step_is_used_where_that_is_asked_for(tmp_path, told):
    folder = saved(tmp_path, 1, 2, 3)
    flip(largest(folder / "3"))
    cut(largest(folder / "2"))
    with opened(tmp_path, told, checkpoint__on_damage="previous") as checkpoints:
        assert checkpoints.newest_undamaged() == 1
        found = checkpoints.restore(1, state(0))
        assert float(found.params["one"][0]) == 1
        checkpoints.save(2, state(2), "text", [])
        checkpoints.finish()
        assert checkpoints.newest_undamaged() == 2
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
        checkpoints.newest_undamaged()


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
def mounted(path, size):
    """A disk of its own that is there, or is not once it was unmounted."""
    path.mkdir(exist_ok=True)
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)


def test_a_full_disk_is_told_of_and_may_be_emptied(tmp_path, told):
    with (
        mounted(tmp_path / "disk", "3m") as disk,
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
        assert some.latest() == 1
        filler.unlink()
        some.save(4, state(4), "text", [], needed=True)
        assert some.latest() == 4
        # Late writes of the save that failed may stay, unfinished, until the next.
        names = [path.name for path in (disk / "checkpoints").iterdir()]
        assert [name for name in names if UNFINISHED not in name] == ["4"]


def test_a_disk_that_is_full_from_the_start_is_told_of(tmp_path):
    run = small.changed(small.RUN, mesh__data=8)
    with mounted(tmp_path / "disk", "1m") as disk:
        with contextlib.suppress(OSError), (disk / "filler").open("wb", 0) as filler:
            while filler.write(bytes(4096)):
                pass
        with pytest.raises(CheckpointError, match="No space left on device; make room"):
            train.train(run, str(disk))
        assert not (disk / "config.json").exists()


def test_the_writes_after_one_that_failed_are_not_told_of(monkeypatch):
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)
    main._silence_failed_writes()
    for words in ("Event loop is closed", "another"):
        sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(words)))
    assert [str(of.exc_value) for of in told] == ["another"]


def save_again(checkpoints):
    for step in (3, 4):
        checkpoints.save(step, state(step), "text", [])


def test_too_many_failed_saves_end_a_run(tmp_path, told):
    with mounted(tmp_path / "disk", "1m") as disk:
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
            assert checkpoints.newest_undamaged() == 1


def test_a_failed_save_removes_no_step(tmp_path, told, monkeypatch):
    saved(tmp_path, 1)

    def fail(self, folder):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Manifest, "seal", fail)
    settings = {"checkpoint__keep": 1, "checkpoint__max_failed_saves": 1}
    with opened(tmp_path, told, **settings) as checkpoints:
        checkpoints.save(2, state(2), "text", [])
        while not told:
            checkpoints.check(together=False)
            time.sleep(0.01)
        assert checkpoints.latest() == 1
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["1"]


def test_a_needed_save_must_not_fail(tmp_path, told):
    with mounted(tmp_path / "disk", "500k") as disk:
        saved(disk, 1)
        with (
            opened(disk, told) as checkpoints,
            pytest.raises(CheckpointError, match="No space left"),
        ):
            checkpoints.save(2, state(2, 200_000), "text", [], needed=True)
        # Orbax waits for no write after the first that fails: on a busy machine one may
        # still come after the folder was cleared.
        for _ in range(50):
            with opened(disk, told) as checkpoints:
                assert checkpoints.newest_undamaged() == 1
            names = [p.name for p in (disk / "checkpoints").iterdir()]
            if names == ["1"]:
                break
            time.sleep(0.1)
        assert names == ["1"]


def test_a_vanished_folder_is_not_made_again(tmp_path, told):
    folder, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    with opened(tmp_path, told, checkpoint__max_failed_saves=2) as checkpoints:
        checkpoints.save(1, state(1), "text", [])
        checkpoints.finish()
        folder.rename(elsewhere)
        checkpoints.save(2, state(2), "text", [])
        assert "could not be written (No such file or directory)" in told[0]
        assert "see that the folder is there" in told[0]
        assert "Training goes on (1 of 2 failures)" in told[0]
        assert not folder.exists()
        elsewhere.rename(folder)
        checkpoints.save(3, state(3), "text", [], needed=True)
        assert checkpoints.steps() == [1, 3]
        folder.rename(elsewhere)
        for step in (4, 5):  # counted anew
            checkpoints.save(step, state(step), "text", [])
        with pytest.raises(CheckpointError, match="newest whole step: 3"):
            checkpoints.save(6, state(6), "text", [])
    assert not folder.exists()


def test_a_disk_that_vanishes_during_a_save_leaves_no_step(tmp_path, told, monkeypatch):
    """What is written on goes to the disk below, where the first part is missing."""
    leave_sums = manifest.leave_sums

    def vanish(folder, process):
        shutil.copytree(disk, tmp_path / "below")
        subprocess.run(["umount", "-l", str(disk)], check=True)
        shutil.copytree(tmp_path / "below", disk, dirs_exist_ok=True)
        leave_sums(folder, process)

    monkeypatch.setattr(manifest, "leave_sums", vanish)
    with mounted(tmp_path / "disk", "3m") as disk, opened(disk, told) as checkpoints:
        with pytest.raises(CheckpointError, match="another disk is there than when"):
            checkpoints.save(1, state(1), "text", [], needed=True)
        assert checkpoints.steps() == []
        assert not list((disk / "checkpoints").iterdir())


def test_killed_at_any_moment_the_newest_whole_step_is_found(tmp_path, monkeypatch):
    """What a kill would leave, copied before each thing that a save does to names."""
    run, moments = tmp_path / "run", []
    saved(run, 1, 2, checkpoint__keep=2)

    def watched(name, act):
        def copy_first(*args, **kwargs):
            is_copy = str(tmp_path) in str(args[0]) and str(run) not in str(args[0])
            # One half removed step is like the others.
            if not is_copy and [n for n, _ in moments].count(name) < 8:
                moments.append((name, tmp_path / str(len(moments))))
                # Other threads rename what they have written meanwhile.
                with contextlib.suppress(shutil.Error):
                    shutil.copytree(run, moments[-1][1])
            return act(*args, **kwargs)

        return copy_first

    names = "rename", "unlink", "mkdir", "rmdir", "fsync"
    with monkeypatch.context() as patch:
        for owner, name in (
            (manifest, "leave_sums"),
            (Manifest, "seal"),
            *((os, name) for name in names),
        ):
            patch.setattr(owner, name, watched(name, getattr(owner, name)))
        saved(run, 3, checkpoint__keep=2)
    assert {name for name, _ in moments} == {"leave_sums", "seal", *names}
    newest = []
    for _, copy in moments:
        with opened(copy, []) as checkpoints:
            newest.append(checkpoints.newest_undamaged())
            found = checkpoints.restore(newest[-1], state(0))
            assert float(found.params["one"][0]) == newest[-1]
            assert checkpoints.steps() in ([1, 2], [1, 2, 3], [2, 3])
            for step in checkpoints.steps():
                checkpoints.verify(step)
            left = {p.name for p in (copy / "checkpoints").glob("[0-9]*")}
            assert left == set(map(str, checkpoints.steps()))
    assert newest == sorted(newest)
    assert set(newest) == {2, 3}


# One of two processes; the parameters are spread over both.
PROCESS = """\
import argparse, errno, os, pathlib, sys, time
from scaletrain import checkpoint, cluster, config, workdir
from scaletrain.checkpoint import manifest, writer
folder, number, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
cluster.join(argparse.Namespace(
    coordinator=f"127.0.0.1:{port}", num_processes=2, process_id=number, heartbeat=30.0
))
import jax, jax.numpy as jnp
from scaletrain.errors import CheckpointError
from scaletrain.program import TrainState

mesh = jax.make_mesh((2,), ("data",))
def state(value):
    whole = TrainState(
        step=jnp.int32(value), params={"one": jnp.full(4000, value, jnp.float32)},
        frozen={}, opt_state={}, key=jnp.zeros(2, jnp.uint32), amax={},
    )
    layout = jax.tree.map(
        lambda x: jax.NamedSharding(mesh, jax.P("data") if x.size == 4000 else jax.P()),
        whole,
    )
    return jax.jit(lambda: whole, out_shardings=layout)()

def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

fails = {  # step -> process, and what of it fails
    2: (1, manifest, "leave_sums"),
    3: (0, manifest.Manifest, "seal"),
    4: (1, pathlib.Path, "write_bytes"),
    6: (1, writer._Sealing, "async_save"),
}
run = config.from_json((folder / "run.json").read_text())
checkpoints = checkpoint.Store(workdir.Workdir(folder), run, say=print)
try:
    for step in range(1, 7):
        who, owner, name = fails.get(step, (None, manifest, "leave_sums"))
        works = getattr(owner, name)
        if who == number:
            setattr(owner, name, full)
        checkpoints.save(step, state(step), "text", [])
        while checkpoints._after:  # no next save is waited for
            checkpoints.check(together=True)
            time.sleep(0.01)
        setattr(owner, name, works)
        print("whole:", checkpoints.steps(), checkpoints.newest_undamaged())
except CheckpointError as err:
    print(err, flush=True)
    cluster.leave(err.exit_code)
"""


def test_what_fails_in_one_process_fails_in_all_at_once(tmp_path, told):
    run = small.changed(RUN, checkpoint__max_failed_saves=3)
    (tmp_path / "run.json").write_text(config.to_json(run))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environ = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    words = [sys.executable, "-c", PROCESS, str(tmp_path)]
    processes = [
        subprocess.Popen(
            [*words, str(number), str(port)],
            env=environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(2)
    ]
    try:
        said = [process.communicate(timeout=60)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for number, lines in enumerate(said):
        reasons = re.findall(
            r"could not be written \((.*?)\); .* goes on \((.*)\)", lines
        )
        whole = re.findall("whole: (.*)", lines)
        assert reasons == [
            (
                f"{'' if who == number else f'process {who}: '}{FULL}",
                f"{n} of 3 failures",
            )
            for n, who in enumerate((1, 0, 1), start=1)
        ], said
        assert whole == [*["[1] 1"] * 4, "[1, 5] 5"]
    # What could not be agreed on: the other is inside Orbax.
    assert f"process 1 could not begin a checkpoint ({FULL}); start all" in said[1]
    assert [process.returncode for process in processes] == [75, 75]
    with opened(tmp_path, told) as checkpoints:
        assert checkpoints.newest_undamaged() == 5
        files = Manifest.read(tmp_path / "checkpoints" / "5").files
        wrote = {path.split("/")[1] for path in files if "ocdbt.process" in path}
        assert wrote == {"ocdbt.process_0", "ocdbt.process_1"}


def test_a_save_copies_everything_once():
    """However many devices hold it: they divide what is the same on several."""
    mesh = jax.make_mesh((4, 2), ("one", "two"))
    shapes = {"whole": (48,), "half": (16, 3), "cut": (8, 6)}
    specs = {"whole": jax.P(), "half": jax.P("two"), "cut": jax.P("one", "two")}
    tree = {
        name: jax.ShapeDtypeStruct(
            shapes[name], jnp.float32, sharding=NamedSharding(mesh, spec)
        )
        for name, spec in specs.items()
    }
    each = 3 * 48 * 4 // 8
    assert writer.copied(tree) == dict.fromkeys(jax.devices(), each)


def test_memory_that_a_save_will_not_have_is_told_of(tmp_path, told, monkeypatch):
    def refused(tree):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of host memory")

    monkeypatch.setattr(writer, "reserve", refused)
    with opened(tmp_path, told) as checkpoints, checkpoints.reserved(state(1)):
        pass
    (line,) = told
    assert "Out of host memory" in line
    assert "saves will fail" in line


def test_temporary_steps_go_when_a_newer_one_is_whole():
    run = small.changed(
        RUN, checkpoint__every_steps=10, checkpoint__keep=2, num_steps=35
    )
    assert retained_steps(run, [0, 10, 13]) == [0, 10, 13]
    assert retained_steps(run, [0, 10, 13, 17, 20]) == [0, 10, 20]
    assert retained_steps(run, [10, 20, 30, 33]) == [20, 30, 33]
    assert retained_steps(run, [20, 30, 33, 35]) == [30, 35]
    all_alike = small.changed(run, checkpoint__every_steps=0)
    assert retained_steps(all_alike, [3, 5, 8]) == [5, 8]


def test_a_workdir_holds_one_run(tmp_path):
    code = (
        "import sys; from scaletrain import lock, workdir\n"
        f"with lock.locked(workdir.Workdir.of({str(tmp_path)!r}), print):\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with (
            pytest.raises(CheckpointError, match=f"process {other.pid} on .* trains"),
            lock.locked(Workdir(tmp_path), print),
        ):
            pass
        other.kill()
    with lock.locked(Workdir(tmp_path), print):  # the kernel let go
        assert json.loads((tmp_path / "lock").read_text())["pid"] != other.pid


def test_imports_have_manifests(tmp_path):
    with opened(tmp_path, []) as checkpoints:
        checkpoints.save_weights({"a/b": jnp.arange(5, dtype=jnp.bfloat16)})
        assert checkpoints.newest_undamaged() == 0
        assert checkpoints.dtypes(0) == {"a/b": jnp.bfloat16}
    assert jax.process_count() == 1
    assert pathlib.Path(tmp_path / "checkpoints" / "0" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.EWOULDBLOCK, "another process trains there"),
        (errno.EIO, "Input/output error; give a folder you may write to"),
    ],
)
def test_a_workdir_that_cannot_be_locked_is_refused(
    tmp_path, monkeypatch, number, words
):
    monkeypatch.setattr(lock.fcntl, "flock", failing(number))
    with (
        pytest.raises(CheckpointError, match=words),
        lock.locked(Workdir(tmp_path), print),
    ):
        pass


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_is_told_of(tmp_path, told, monkeypatch, number):
    monkeypatch.setattr(lock.fcntl, "flock", failing(number))
    with lock.locked(Workdir(tmp_path), told.append):
        pass
    assert "its file system has no locks" in told[0]
    assert os.strerror(number) in told[0]


def failing(number):
    def fail(*args):
        raise OSError(number, os.strerror(number))

    return fail
