"""The folder of a run: the names of its files, and readers that need no jax."""

import contextlib
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from scaletrain.errors import CheckpointError


@dataclasses.dataclass(frozen=True)
class Workdir:
    """The folder of a run: the path of each file, and readers of some of them.

    It also contains `events.out.tfevents.*`, see `monitor.tensorboard`.
    """

    path: pathlib.Path

    @classmethod
    def of(cls, workdir: str) -> "Workdir":
        """Returns the folder at a path from a command line."""
        return cls(pathlib.Path(workdir))

    def __str__(self) -> str:
        return str(self.path)

    @property
    def config(self) -> pathlib.Path:
        """The file of the run's settings."""
        return self.path / "config.json"

    @property
    def metrics(self) -> pathlib.Path:
        """The file of the records of steps, a line each."""
        return self.path / "metrics.jsonl"

    @property
    def attempts(self) -> pathlib.Path:
        """The file of the time of each attempt, see `monitor.goodput`."""
        return self.path / "attempts.json"

    @property
    def status(self) -> pathlib.Path:
        """The file of the present phase, see `monitor.phase_clock`."""
        return self.path / "status.json"

    @property
    def rollbacks(self) -> pathlib.Path:
        """The file of the rollbacks, see `rollbacks`."""
        return self.path / "rollbacks.json"

    @property
    def checkpoints(self) -> pathlib.Path:
        """The folder of the saved steps, with a folder for each."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> pathlib.Path:
        """The folder of the run's tokenizer, see `data.tokenizers`."""
        return self.path / "tokenizer"

    @property
    def compiled(self) -> pathlib.Path:
        """The folder of executables, so that the next attempt need not compile."""
        return self.path / "compiled"

    @property
    def lock(self) -> pathlib.Path:
        """The file that a run locks while it trains."""
        return self.path / "lock"

    def stacks(self, process: int, stamp: str) -> pathlib.Path:
        """Returns the file of the stacks of a process that hung.

        Args:
          process: its number.
          stamp: the time.
        """
        return self.path / f"stacks-{process}-{stamp}.txt"

    def steps(self) -> list[int]:
        """Returns the complete steps in `checkpoints`, in order."""
        names = [path.name for path in self.checkpoints.glob("*")]
        return sorted(int(name) for name in names if name.isdigit())

    def records(self) -> list[dict[str, Any]]:
        """Returns the records in `metrics`, without incomplete lines."""
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
        """Returns the numbers of the newest evaluation up to `step`, with its step.

        Without an evaluation: `step`, and "evaluated" as False.
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
        """Returns the newest saved step by the records, None if they have none."""
        steps = [record.get("newest_saved") for record in self.records()]
        return max((step for step in steps if isinstance(step, int)), default=None)

    def rollback_records(self) -> list[dict[str, Any]]:
        """Returns the records in `rollbacks`; each has at least "step" and "left_out".

        Raises:
          CheckpointError: the file is damaged.
        """
        path = self.rollbacks
        if not path.exists():
            return []
        try:
            records = json.loads(path.read_text("utf-8", "replace"))
            if not isinstance(records, list) or not all(map(_is_rollback, records)):
                raise ValueError("not what a run writes there")
            return records
        except (ValueError, RecursionError) as err:
            raise CheckpointError(
                f"{path}; damaged ({err}); without it the run would read batches "
                "it left out; remove it to go by the newest checkpoint alone."
            ) from err


def _is_rollback(record: Any) -> bool:
    return isinstance(record, dict) and all(
        type(record.get(name)) is int for name in ("step", "left_out")
    )


def make_workdir(workdir: str) -> Workdir:
    """Returns the workdir at a path, made if missing.

    Raises:
      CheckpointError: the folder cannot be made or written.
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
def as_checkpoint_error(workdir: Workdir) -> Iterator[None]:
    """A context in which an error of the disk names the workdir and a remedy.

    Raises:
      CheckpointError: for an OSError inside the `with` block.
    """
    try:
        yield
    except OSError as err:
        raise CheckpointError(
            f"--workdir={workdir}; {err.strerror}; make room, or give a folder on "
            "another disk."
        ) from err
