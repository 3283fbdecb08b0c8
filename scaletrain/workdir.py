"""The folder of a run: the files in it, and readers that need no jax."""

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
