"""Going back: the updates that were skipped, and the batches a run does without.

Updates that are skipped leave the weights as they were, so taking the steps since a
checkpoint again with the same batches would end where it began. Going back leaves out
every batch since the checkpoint.

`rollbacks.json` in the workdir is written before anything else changes. A run that is
killed while it goes back goes on as if it had not been.
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

_LISTED = 200  # documents of a skipped update that are written down
_TOLD = 5  # and of these, that a line on the terminal names


@dataclasses.dataclass(frozen=True)
class Skip:
    """A step whose update was left out."""

    step: int
    reason: str
    loss: float
    grad_norm: float
    num_documents: int
    documents: list[int]  # the first ids, see `data.Sequences`; in process 0 alone

    def record(self) -> dict[str, Any]:
        """Returns the skip for JSON, which has no number for what is not finite."""
        found = dataclasses.asdict(self)
        for name in ("loss", "grad_norm"):
            found[name] = found[name] if math.isfinite(found[name]) else None
        return found

    def __str__(self) -> str:
        told = ", ".join(map(str, self.documents[:_TOLD]))
        more = ", ..." if self.num_documents > _TOLD else ""
        if self.documents:
            told = f"; {self.num_documents} documents: {told}{more}"
        return (
            f"step {self.step}: update skipped, {self.reason} (loss {self.loss:.4g}, "
            f"gradient norm {self.grad_norm:.4g}{told})"
        )


def skip_of(step: int, numbers: Mapping[str, Any], documents: Sequence[int]) -> Skip:
    """Returns what there is to say of a step whose update was left out."""
    loss, norm = float(numbers["loss"]), float(numbers["grad_norm"])
    if not math.isfinite(loss) or not math.isfinite(norm):
        reason = "loss or gradient not finite"
    elif loss > numbers["loss_limit"]:
        reason = f"loss above {float(numbers['loss_limit']):.4g}"
    elif norm > numbers["grad_norm_limit"]:
        reason = f"gradient norm above {float(numbers['grad_norm_limit']):.4g}"
    else:
        reason = "a part of the batch not finite"
    return Skip(step, reason, loss, norm, len(documents), list(documents[:_LISTED]))


class Diverged(Exception):
    """Too many updates in a row were skipped: it is time to go back, or to stop."""

    def __init__(self, first: int, last: int, skips: Sequence[Skip]):
        self.first, self.last, self.skips = first, last, tuple(skips)
        super().__init__(f"steps {first} to {last}")


class Rollbacks:
    """How often a run went back, where to, and what it left out for good."""

    def __init__(self, workdir: Workdir, checkpoints: Store, say: Callable[[str], Any]):
        """Reads what the workdir says.

        Raises:
          CheckpointError: `rollbacks.json` is damaged.
        """
        self._path = workdir.rollbacks
        self._checkpoints, self._say = checkpoints, say
        self.records = workdir.rollback_records()
        newest = checkpoints.latest()
        data = None if newest is None else checkpoints.data(newest)
        # A checkpoint that was moved elsewhere alone knows what came before it.
        stored = data["rollbacks"] if data else []
        self.records = max(self.records, stored, key=len)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """The (step, batches): the steps after that one do without these batches."""
        found: list[tuple[int, int]] = []
        for record in self.records:
            # What was left out further on is counted in when a run goes further back.
            found = [pair for pair in found if pair[0] <= record["step"]]
            found.append((record["step"], record["left_out"]))
        return found

    def brief(self) -> list[dict[str, Any]]:
        """Returns what a checkpoint has to know of it."""
        return [{"step": r["step"], "left_out": r["left_out"]} for r in self.records]

    def go_back(self, why: Diverged) -> int | None:
        """Goes back to the newest checkpoint from before the first skip.

        One that the run went back to already has not helped: the one before it is
        taken, if there is any. An import is the last resort.

        Returns:
          Its step, which is the newest there is now.

        Raises:
          DivergedError: there is no such checkpoint, or the run went back too often.
        """
        self._checkpoints.finish()
        before = [step for step in self._checkpoints.steps() if step < why.first]
        most = self._checkpoints.run.optim.max_rollbacks
        if not before or len(self.records) >= most:
            raise DivergedError(self._story(why, bool(before)))
        tried = {0} | {record["step"] for record in self.records}
        step = ([s for s in before if s not in tried] or before)[-1]
        further_on = sum(batches for at, batches in self.left_out if at > step)
        left_out = why.last - step + further_on
        record = {
            "step": step,
            "left_out": left_out,
            "first_skip": why.first,
            "last_skip": why.last,
            "skips": [skip.record() for skip in why.skips],
        }
        self._keep([*self.records, record])
        self._say(
            f"going back to step {step}; the {left_out} batches since are left out "
            f"({len(self.records)} of optim.max_rollbacks={most})"
        )
        return self.clear()

    def _keep(self, records: list[dict[str, Any]]) -> None:
        """Makes the records durable before any process relies on them."""
        self.records = records
        if cluster.lead():
            content = json.dumps(records, indent=1).encode()
            atomic_write(self._path, content, durable=True)
        cluster.wait("rollback")

    def clear(self) -> int | None:
        """Removes the checkpoints of what was gone back on, also before a kill.

        Returns:
          The newest step there is then, its files compared if it was not the newest.

        Raises:
          CheckpointError: it is damaged, see `Checkpoints.sound`.
        """
        removed = False
        for step in self._checkpoints.steps():
            since = [i for i, r in enumerate(self.records) if r["step"] < step]
            if since and self._known(step) <= since[-1]:
                self._say(f"removing checkpoint {step}: the run went back on it")
                self._checkpoints.remove(step)
                removed = True
        return self._checkpoints.sound() if removed else self._checkpoints.latest()

    def _known(self, step: int) -> int:
        """Returns how often the run had gone back when it saved `step`."""
        data = self._checkpoints.data(step)
        assert data is not None, "an import is older than any rollback"
        return len(data["rollbacks"])

    def _story(self, why: Diverged, has_checkpoint: bool) -> str:
        """Returns all that a person needs to decide what to do now."""
        optim, newest = self._checkpoints.run.optim, self._checkpoints.latest()
        if not has_checkpoint:
            end = f"no checkpoint from before step {why.first} to go back to"
        elif optim.max_rollbacks:
            end = f"the run went back optim.max_rollbacks={optim.max_rollbacks} times"
        else:
            end = "optim.max_rollbacks=0, so the run does not go back"
        gone_back = [
            # What a checkpoint knows of it does not say which steps.
            f"  steps {r.get('first_skip', '?')} to {r.get('last_skip', '?')} "
            f"skipped; back to step {r['step']} without {r['left_out']} batches"
            for r in self.records
            if "skips" in r
        ]
        lines = [
            f"step {why.last}: no update for {why.last - why.first + 1} steps in a row "
            "(optim.max_skipped_steps), each with its line above and its record in "
            f"metrics.jsonl; {end}{':' if gone_back else '.'}",
            *gone_back,
            "lower optim.learning_rate, or read those documents (skip_documents in "
            "metrics.jsonl); with a higher optim.max_rollbacks or optim.spike_sigma "
            f"the same command goes on; newest checkpoint: {newest}.",
        ]
        return "\n".join(lines)
