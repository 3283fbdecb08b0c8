"""The folder of a run: its map, and the lock that one run at a time holds."""

import contextlib
import dataclasses
import errno
import fcntl
import json
import math
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from scaletrain.errors import CheckpointError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of a run: the name of each file in it, and readers of what they say.

    Besides these it holds `events.out.tfevents.*`, see `monitor.tensorboard`.
    """

    path: pathlib.Path

    @classmethod
    def of(cls, workdir: str) -> "Workdir":
        """Returns the folder that a command line calls `workdir`."""
        return cls(pathlib.Path(workdir))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> pathlib.Path:
        """The run's settings."""
        return self.path / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        """The records of its steps, a line each."""
        return self.path / "metrics.jsonl"

    @property
    def attempts(self) -> pathlib.Path:
        """The time of each attempt, see `monitor.goodput`."""
        return self.path / "attempts.json"

    @property
    def status(self) -> pathlib.Path:
        """The phase that the run is in now, see `monitor.phase_clock`."""
        return self.path / "status.json"

    @property
    def rollbacks(self) -> pathlib.Path:
        """The checkpoints that the run went back to, see `rollbacks`."""
        return self.path / "rollbacks.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """A folder for each saved step."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> pathlib.Path:
        """The files of the run's tokenizer, see `data.tokenizers`."""
        return self.path / "tokenizer"

    @property
    def compiled(self) -> pathlib.Path:
        """Executables, so that the next attempt need not compile."""
        return self.path / "compiled"

    @property
    def lock(self) -> pathlib.Path:
        """The file that the run holds while it trains."""
        return self.path / "lock"

    def stacks(self, process: int, stamp: str) -> pathlib.Path:
        """The stacks of a process that hung at the time `stamp`."""
        return self.path / f"stacks-{process}-{stamp}.txt"

    def steps(self) -> list[int]:
        """Returns the complete steps in `checkpoints`, in order."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def records(self) -> list[dict[str, Any]]:
        """Returns the records in `metrics`, but a line that is cut off."""
        return [record for _, record in self.lines()]

    def lines(self) -> Iterator[tuple[bytes, dict[str, Any]]]:
        """Yields each line of `metrics` that is a record, and the record."""
        path = self.metrics
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        for line in lines:
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                complete = line.endswith(b"\n") and isinstance(record, dict)
                if complete and isinstance(record.get("step"), int):
                    yield line, record

    def newest_evaluation(self, step: int) -> dict[str, Any]:
        """Returns the numbers of the newest evaluation up to `step`, and its own step.

        Where nothing was evaluated there is `step` and "evaluated", which is False.
        """
        for record in reversed(self.records()):
            if record["step"] <= step and "eval_loss" in record:
                numbers = {
                    name.removeprefix("eval_"): math.nan if value is None else value
                    for name, value in record.items()
                    if name.startswith("eval_")
                }
                return {"step": record["step"], **numbers}
        return {"step": step, "evaluated": False}

    def newest_saved(self) -> int | None:
        """Returns the newest step that a record tells was saved."""
        steps = [record.get("newest_saved") for record in self.records()]
        return max((step for step in steps if isinstance(step, int)), default=None)


def prepare(workdir: str) -> Workdir:
    """Returns the workdir, made if missing.

    Raises:
      CheckpointError: it cannot be made or written.
    """
    path = Workdir.of(workdir).path
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(
            f"--workdir={workdir}; {err.strerror}; give a folder that can be made."
        ) from err
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"--workdir={workdir}; not writable; give a folder you may write to."
        )
    return Workdir(path)


@contextlib.contextmanager
def writing(workdir: Workdir) -> Iterator[None]:
    """Tells of a disk that refuses what a run cannot begin without.

    Raises:
      CheckpointError: something inside could not be written.
    """
    try:
        yield
    except OSError as err:
        raise CheckpointError(
            f"--workdir={workdir}; {err.strerror}; make room, or give a folder on "
            "another disk."
        ) from err


@contextlib.contextmanager
def held(workdir: Workdir, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs out of a workdir; readers do not ask.

    The kernel lets go when the process dies, however it does. Where a network file
    system does not carry locks between hosts, two hosts are not kept apart; one that
    has no locks at all is told of.

    Raises:
      CheckpointError: another run is in it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Without a buffer nothing is left to be written when it closes.
            file = stack.enter_context(workdir.lock.open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise CheckpointError(
                f"--workdir={workdir}; {_holder(workdir.lock)} trains there; wait for "
                "it, end it, or give another folder."
            ) from err
        except OSError as err:
            if err.errno not in _NO_LOCKS:
                raise CheckpointError(
                    f"--workdir={workdir}; {err.strerror}; give a folder you may "
                    "write to."
                ) from err
            say(
                f"--workdir={workdir}; its file system has no locks ({err.strerror}), "
                "so a second run would not be refused; start none there."
            )
        else:
            with contextlib.suppress(OSError):  # the lock holds on a full disk too
                file.truncate(0)
                file.write(json.dumps(_self()).encode())
        yield


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(lock: pathlib.Path) -> str:
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
