"""`scaletrain supervise -- train ...`: a run that is started again until it is over.

What is worth another start is an interruption (exit code 75) or a death by a signal; a
run that failed or a request that cannot be honoured ends it. Nothing here imports jax:
the devices belong to the process that is started.
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

_MOST_PARTS = 64
FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 300.0
_CENSUS = (
    "import collections, jax; print(jax.device_count(), "
    "len({getattr(d, 'slice_index', 0) for d in jax.devices()}))"
)


@dataclasses.dataclass
class Supervisor:
    """Starts one command until it ends for good.

    Args:
      words: of `scaletrain`, `train` first.
      retries: starts in a row that may bring no new checkpoint.
    """

    words: Sequence[str]
    workdir: str
    retries: int
    sleep: Callable[[float], None] = time.sleep
    _child: subprocess.Popen[bytes] | None = None
    _stopped: bool = False

    def until_over(self) -> int:
        """Returns the exit code of the last start."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._forward)
        failed, more = 0, []
        while True:
            before = newest(self.workdir)
            code = self._once([*self.words, *more])
            if self._stopped or not worth_another(code):
                return code
            after = newest(self.workdir)
            failed = 0 if after > before else failed + 1
            if failed > self.retries:
                starts = counted(failed, "start")
                _say(f"{starts} without a new checkpoint; giving up")
                return code
            left = counted(self.retries - failed, "retry", "retries")
            wait_s = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2**failed)
            _say(
                f"ended with {code} at step {max(after, 0)}; starting again in "
                f"{wait_s:.0f} s ({left} left)"
            )
            self.sleep(wait_s)
            if self._stopped:
                return code
            more = self._fitted()

    def _once(self, words: Sequence[str]) -> int:
        self._child = subprocess.Popen(
            [sys.executable, "-m", "scaletrain.main", *words]
        )
        return self._child.wait()

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Hands a signal on; what it ends is not started again."""
        del frame
        self._stopped = True
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def _fitted(self) -> list[str]:
        """Returns overrides that put the run on the devices that are left."""
        settings = Workdir.of(self.workdir).config
        asked = subprocess.run(
            [sys.executable, "-c", _CENSUS], capture_output=True, text=True, check=False
        )
        if asked.returncode or not settings.is_file():
            return []  # the next start will say what is wrong
        devices, slices = map(int, asked.stdout.split()[-2:])
        found = fitted(config.load(str(settings), []), devices, slices)
        if found:
            _say(f"left: {counted(devices, 'device')}: {' '.join(found)}")
        return found


def fitted(run: RunConfig, devices: int, slices: int) -> list[str]:
    """Returns overrides that keep what a resolved `run` learns on other devices.

    Axes that cut a layer or a sequence stay, since memory was planned with them; `fsdp`
    stays as large as it can, `data` takes the rest, and a batch is computed in as many
    more parts as there are fewer devices. Nothing where the run fits as it is, or
    where nothing does: the next start says why.
    """
    mesh = run.mesh
    if mesh.num_devices == devices and mesh.num_slices in (1, slices):
        return []
    shards = run.batch_shards
    kept = (mesh.num_devices or 0) // shards
    left, rest = divmod(devices, kept * slices)
    if rest:
        return []
    for fsdp in range(min(left, mesh.fsdp), 0, -1):
        for more in range(1, _MOST_PARTS + 1):
            overrides = {
                "mesh.data": left // fsdp,
                "mesh.fsdp": fsdp,
                "mesh.dcn.data": slices,
                "mesh.dcn.fsdp": 1,
                "accumulate_steps": run.accumulate_steps * more,
            }
            enough = more * left * slices >= shards
            if left % fsdp or not enough:
                continue
            if config.is_possible(config.applied(run, overrides), devices):
                return config.flags(overrides)
    return []


def worth_another(code: int) -> bool:
    """Returns whether an exit code is an interruption or a death by a signal."""
    return code == Interrupted.exit_code or code < 0 or code > 128


def newest(workdir: str) -> int:
    """Returns the newest step in a workdir's checkpoints, -1 where there is none."""
    return max(Workdir.of(workdir).steps(), default=-1)


def _say(words: str) -> None:
    print(f"supervise: {words}", file=sys.stderr, flush=True)
