"""The supervisor, `scaletrain supervise -- train ...`: restarts a run until it ends.

A run is started again after an interruption (exit code 75) or a death by a signal, but
not after another failure or a request that cannot be honoured. This module must not
import jax: the devices belong to the process that it starts.
"""

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from scaletrain import config
from scaletrain.config import RunConfig
from scaletrain.errors import Interrupted, counted
from scaletrain.workdir import Workdir

_MAX_ACCUMULATION = 64  # the most that `fitted` multiplies accumulate_steps by
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
# A program for a process of its own, which frees the devices when it ends.
_COUNT_DEVICES = (
    "import collections, jax; print(jax.device_count(), "
    "len({getattr(d, 'slice_index', 0) for d in jax.devices()}))"
)


@dataclasses.dataclass
class Supervisor:
    """A supervisor of one command, which it starts until it ends for good.

    Args:
      words: the arguments of `scaletrain`, `train` first.
      workdir: the workdir among them.
      retries: the most restarts in a row without a new checkpoint.
      sleep: waits for seconds between two starts.
    """

    words: Sequence[str]
    workdir: str
    retries: int
    sleep: Callable[[float], None] = time.sleep
    _child: subprocess.Popen[bytes] | None = None
    _stopped: bool = False

    def until_over(self) -> int:
        """Returns the exit code of the last start, after all of them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        failed, overrides = 0, []  # starts in a row without a new checkpoint
        while True:
            before = newest(self.workdir)
            code = self._once([*self.words, *overrides])
            if self._stopped or not worth_another(code):
                return code
            after = newest(self.workdir)
            failed = 0 if after > before else failed + 1
            if failed > self.retries:
                starts = counted(failed, "start")
                _say(f"{starts} without a new checkpoint; giving up")
                return code
            retries = counted(self.retries - failed, "retry", "retries")
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**failed)
            _say(
                f"ended with {code} at step {max(after, 0)}; starting again in "
                f"{wait_s:.0f} s ({retries} left)"
            )
            self.sleep(wait_s)
            if self._stopped:
                return code
            overrides = self._fitted()

    def _once(self, words: Sequence[str]) -> int:
        """Returns the exit code of one start; below 0 it is a signal's number."""
        self._child = subprocess.Popen(
            [sys.executable, "-m", "scaletrain.main", *words]
        )
        return self._child.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal to the run, which is not started again after it."""
        del frame
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _fitted(self) -> list[str]:
        """Returns overrides that fit the run onto the devices that are still there."""
        settings = Workdir.of(self.workdir).config
        count = subprocess.run(
            [sys.executable, "-c", _COUNT_DEVICES],
            capture_output=True,
            text=True,
            check=False,
        )
        if count.returncode or not settings.is_file():
            return []  # the next start reports the error
        devices, slices = map(int, count.stdout.split()[-2:])
        overrides = fitted(config.load(str(settings), []), devices, slices)
        if overrides:
            _say(f"left: {counted(devices, 'device')}: {' '.join(overrides)}")
        return overrides


def fitted(run: RunConfig, devices: int, slices: int) -> list[str]:
    """Returns overrides that train a run on other devices, with the same batches.

    Axes that split a layer or a sequence stay, since memory was planned with them.
    `fsdp` stays as large as possible, and `data` takes the rest. A batch is computed in
    more micro-batches if there are fewer devices. There are no overrides if the run
    fits as it is, or if no mesh fits: then the next start reports the reason.

    Args:
      run: the settings, resolved on the devices of before.
      devices: the number of devices now.
      slices: the number of slices that they form.
    """
    mesh = run.mesh
    if mesh.num_devices == devices and mesh.num_slices in (1, slices):
        return []
    shards = run.batch_shards
    # Devices of a batch shard, and batch shards of a slice.
    shard_devices = (mesh.num_devices or 0) // shards
    slice_shards, remainder = divmod(devices, shard_devices * slices)
    if remainder:
        return []
    for fsdp in range(min(slice_shards, mesh.fsdp), 0, -1):
        for factor in range(1, _MAX_ACCUMULATION + 1):
            overrides = {
                "mesh.data": slice_shards // fsdp,
                "mesh.fsdp": fsdp,
                "mesh.dcn.data": slices,
                "mesh.dcn.fsdp": 1,
                "accumulate_steps": run.accumulate_steps * factor,
            }
            # A micro-batch must not be larger on a device than it was.
            small_enough = factor * slice_shards * slices >= shards
            if slice_shards % fsdp or not small_enough:
                continue
            if config.is_possible(config.applied(run, overrides), devices):
                return config.flags(overrides)
    return []


def worth_another(code: int) -> bool:
    """Returns whether an exit code is an interruption or a death by a signal."""
    return code == Interrupted.exit_code or code < 0 or code > 128


def newest(workdir: str) -> int:
    """Returns the newest step in a workdir, -1 if it has no checkpoint."""
    return max(Workdir.of(workdir).steps(), default=-1)


def _say(line: str) -> None:
    print(f"supervise: {line}", file=sys.stderr, flush=True)
