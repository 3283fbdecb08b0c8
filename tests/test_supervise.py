"""Starting again: what is worth it, when to give up, and on which mesh."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import small

from scaletrain import config, supervise
from scaletrain.config import AxesConfig, MeshConfig
from scaletrain.supervise import Supervisor


class Scripted(Supervisor):
    """Ends as it is told to, leaving checkpoints behind."""

    def script(self, *ends):
        """Says how starts end: the exit code, and the step that is saved."""
        self.ends, self.waits = list(ends), []
        self.sleep = self.waits.append
        return self

    def _once(self, words):
        code, step = self.ends.pop(0)
        if step is not None:
            (self.folder / "checkpoints" / str(step)).mkdir(parents=True)
        return code

    def _fitted(self):
        return []


@pytest.fixture
def supervisor(tmp_path):
    made = Scripted(["train"], str(tmp_path), retries=2)
    made.folder = tmp_path
    return made


def test_an_interruption_is_started_again_until_it_is_done(supervisor):
    assert supervisor.script((75, 1), (-9, 2), (139, 3), (0, 4)).until_over() == 0
    assert supervisor.waits == [1, 1, 1]  # each brought a new checkpoint


@pytest.mark.parametrize("code", [0, 1, 2])
def test_what_failed_is_not_started_again(supervisor, code):
    assert supervisor.script((code, None)).until_over() == code
    assert supervisor.waits == []


def test_retries_are_those_without_progress(supervisor, capsys):
    ends = [(75, None), (75, None), (75, 5), (75, None), (-9, None), (75, None)]
    assert supervisor.script(*ends).until_over() == 75
    assert supervisor.waits == [2, 4, 1, 2, 4]
    assert "3 starts without a new checkpoint; giving up" in capsys.readouterr().err


def on(run, found, devices):
    for flag in found:
        path, value = flag.removeprefix("--config.").split("=")
        run = config.applied(run, {path: int(value)})
    return config.resolve(run, devices)


@pytest.mark.parametrize(
    ("mesh", "devices", "slices", "data", "fsdp", "parts"),
    [
        (MeshConfig(data=2, fsdp=4), 4, 1, 1, 4, 2),
        (MeshConfig(data=1, fsdp=4, tensor=2), 4, 1, 1, 2, 2),
        (MeshConfig(fsdp=4, dcn=AxesConfig(data=2)), 4, 1, 1, 4, 2),
        (MeshConfig(fsdp=4), 8, 1, 2, 4, 1),
    ],
)
def test_a_run_moves_to_the_devices_that_are_left(
    mesh, devices, slices, data, fsdp, parts
):
    run = small.changed(small.RUN, mesh=mesh)
    moved = on(run, supervise.fitted(run, devices, slices), devices)
    assert (moved.mesh.data, moved.mesh.fsdp) == (data, fsdp)
    assert moved.mesh.tensor == mesh.tensor
    assert moved.accumulate_steps == parts
    assert moved.batch_size == run.batch_size


def test_a_run_that_fits_or_cannot_fit_stays(tmp_path):
    run = small.changed(small.RUN, mesh=MeshConfig(data=2, tensor=2))
    assert supervise.fitted(run, 4, 1) == []
    assert supervise.fitted(run, 3, 1) == []  # heads are cut in two


def test_a_signal_is_handed_on_and_ends_it(tmp_path):
    class Slow(Supervisor):
        def _once(self, words):
            code = (
                "import signal, sys, time; signal.signal(signal.SIGTERM, "
                "lambda *a: sys.exit(75)); print(1, flush=True); time.sleep(60)"
            )
            self._child = subprocess.Popen(
                [sys.executable, "-c", code], stdout=subprocess.PIPE
            )
            self._child.stdout.readline()
            self._child.stdout.close()
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            return self._child.wait()

    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    try:
        assert Slow(["train"], str(tmp_path), retries=2).until_over() == 75
    finally:
        for number, handler in zip(
            (signal.SIGTERM, signal.SIGINT), before, strict=True
        ):
            signal.signal(number, handler)
