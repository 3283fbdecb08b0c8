"""Rollbacks: returns to an earlier checkpoint after many skipped updates.

The same steps with the same batches would skip the same updates again. So after a
rollback the run leaves out every batch that it read since the checkpoint.

`rollbacks.json` in the workdir is written before any checkpoint is removed. A run that
is killed during a rollback completes it at the next start.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from scaletrain import cluster
from scaletrain.checkpoint import Store
from scaletrain.errors import DivergedError
from scaletrain.files import atomic_write
from scaletrain.workdir import Workdir

_RECORDED = 200  # documents of a skipped update that metrics.jsonl lists
_SHOWN = 5  # documents of a skipped update that the terminal shows


@dataclasses.dataclass(frozen=True)
class Skip:
    """A step whose update was skipped."""

    step: int
    reason: str
    loss: float
    grad_norm: float
    num_documents: int
    documents: list[int]  # the first ids, see `data.Sequences`; in process 0 alone

    def record(self) -> dict[str, Any]:
        """Returns the skip for JSON, with None for a number that is not finite."""
        record = dataclasses.asdict(self)
        for name in ("loss", "grad_norm"):
            record[name] = record[name] if math.isfinite(record[name]) else None
        return record

    def __str__(self) -> str:
        documents = ", ".join(map(str, self.documents[:_SHOWN]))
        dots = ", ..." if self.num_documents > _SHOWN else ""
        if self.documents:
            documents = f"; {self.num_documents} documents: {documents}{dots}"
        return (
            f"step {self.step}: update skipped, {self.reason} (loss {self.loss:.4g}, "
            f"gradient norm {self.grad_norm:.4g}{documents})"
        )


def skip_of(step: int, numbers: Mapping[str, Any], documents: Sequence[int]) -> Skip:
    """Returns the record of a skipped update, with the reason.

    Args:
      step: the step of the update.
      numbers: the results of the train step.
      documents: the ids of the documents in its batch.
    """
    loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
    if not math.isfinite(loss) or not math.isfinite(norm):
        reason = "loss or gradient not finite"
    elif loss > numbers["loss_limit"]:
        reason = f"loss above {float(numbers['loss_limit']):.4g}"
    elif norm > numbers["grad_norm_limit"]:
        reason = f"gradient norm above {float(numbers['grad_norm_limit']):.4g}"
    else:
        reason = "a part of the batch not finite"
    return Skip(step, reason, loss, norm, len(documents), list(documents[:_RECORDED]))


class Diverged(Exception):
    """Too many updates in a row were skipped: the run must go back or stop.

    Args:
      first: the first step of the row.
      last: the last step of the row.
      skips: the skips that this process has recorded.
    """

    def __init__(self, first: int, last: int, skips: Sequence[Skip]):
        self.first, self.last, self.skips = first, last, tuple(skips)
        super().__init__(f"steps {first} to {last}")


class Rollbacks:
    """The rollbacks of a run: their checkpoints and the batches they left out."""

    def __init__(self, workdir: Workdir, checkpoints: Store, say: Callable[[str], Any]):
        """Reads the rollbacks so far.

        Args:
          workdir: the folder of the run.
          checkpoints: of the run.
          say: shows a line to the user.

        Raises:
          CheckpointError: `rollbacks.json` is damaged.
        """
        self._path = workdir.rollbacks
        self._checkpoints, self._say = checkpoints, say
        self.records = workdir.rollback_records()
        newest = checkpoints.latest()
        data = None if newest is None else checkpoints.data(newest)
        # A checkpoint may have been copied to another workdir, without rollbacks.json.
        stored = data["rollbacks"] if data else []
        self.records = max(self.records, stored, key=len)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """Pairs (step, batches): so many batches are left out after that step."""
        pairs: list[tuple[int, int]] = []
        for record in self.records:
            # The count of a rollback includes batches left out earlier at later steps.
            pairs = [pair for pair in pairs if pair[0] <= record["step"]]
            pairs.append((record["step"], record["left_out"]))
        return pairs

    def brief(self) -> list[dict[str, Any]]:
        """Returns the records that a checkpoint stores: steps and counts alone."""
        return [{"step": r["step"], "left_out": r["left_out"]} for r in self.records]

    def go_back(self, diverged: Diverged) -> int | None:
        """Returns the step of the checkpoint to go on from, which is now the newest.

        It is the newest one before the first skip. A checkpoint that the run already
        went back to did not help, so an older one is preferred. An import (step 0) is
        the last resort.

        Raises:
          DivergedError: there is no such checkpoint, or the run went back too often.
        """
        self._checkpoints.finish()
        before = [step for step in self._checkpoints.steps() if step < diverged.first]
        most = self._checkpoints.run.optim.max_rollbacks
        if not before or len(self.records) >= most:
            raise DivergedError(self._story(diverged, bool(before)))
        tried = {0} | {record["step"] for record in self.records}
        step = ([s for s in before if s not in tried] or before)[-1]
        # Batches left out at later steps were passed over too, besides those read.
        passed_over = sum(count for after, count in self.left_out if after > step)
        left_out = diverged.last - step + passed_over
        record = {
            "step": step,
            "left_out": left_out,
            "first_skip": diverged.first,
            "last_skip": diverged.last,
            "skips": [skip.record() for skip in diverged.skips],
        }
        self._write([*self.records, record])
        self._say(
            f"going back to step {step}; the {left_out} batches since are left out "
            f"({len(self.records)} of optim.max_rollbacks={most})"
        )
        return self.remove_abandoned()

    def _write(self, records: list[dict[str, Any]]) -> None:
        """Writes the records durably, before any process acts on them."""
        self.records = records
        if cluster.lead():
            content = json.dumps(records, indent=1).encode()
            atomic_write(self._path, content, durable=True)
        cluster.wait("rollback")

    def remove_abandoned(self) -> int | None:
        """Returns the newest step, after the removal of abandoned checkpoints.

        Those are the later steps that a rollback has abandoned, also one that was
        interrupted by a kill. If any was removed, the newest step is verified.

        Raises:
          CheckpointError: it is damaged, see `Store.newest_undamaged`.
        """
        removed = False
        for step in self._checkpoints.steps():
            below = [i for i, r in enumerate(self.records) if r["step"] < step]
            if below and self._rollbacks_before(step) <= below[-1]:
                self._say(f"removing checkpoint {step}: the run went back on it")
                self._checkpoints.remove(step)
                removed = True
        if removed:
            return self._checkpoints.newest_undamaged()
        return self._checkpoints.latest()

    def _rollbacks_before(self, step: int) -> int:
        """Returns the number of rollbacks before `step` was saved."""
        data = self._checkpoints.data(step)
        assert data is not None, "an import is older than any rollback"
        return len(data["rollbacks"])

    def _story(self, diverged: Diverged, has_checkpoint: bool) -> str:
        """Returns the error text: the reason, the rollbacks so far, and remedies."""
        optim, newest = self._checkpoints.run.optim, self._checkpoints.latest()
        if not has_checkpoint:
            end = f"no checkpoint from before step {diverged.first} to go back to"
        elif optim.max_rollbacks:
            end = f"the run went back optim.max_rollbacks={optim.max_rollbacks} times"
        else:
            end = "optim.max_rollbacks=0, so the run does not go back"
        gone_back = [
            # Records restored from a checkpoint lack the skipped steps, see `brief`.
            f"  steps {r.get('first_skip', '?')} to {r.get('last_skip', '?')} "
            f"skipped; back to step {r['step']} without {r['left_out']} batches"
            for r in self.records
            if "skips" in r
        ]
        lines = [
            f"step {diverged.last}: no update for "
            f"{diverged.last - diverged.first + 1} steps in a row "
            "(optim.max_skipped_steps), each with its line above and its record in "
            f"metrics.jsonl; {end}{':' if gone_back else '.'}",
            *gone_back,
            "lower optim.learning_rate, or read those documents (skip_documents in "
            "metrics.jsonl); with a higher optim.max_rollbacks or optim.spike_sigma "
            f"the same command goes on; newest checkpoint: {newest}.",
        ]
        return "\n".join(lines)
