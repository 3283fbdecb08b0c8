"""The steps of one attempt, and what happens between them."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from scaletrain import (
    checkpoint,
    cluster,
    data,
    evaluate,
    input_pipeline,
    rollbacks,
    sharding,
)
from scaletrain.console import say
from scaletrain.errors import Interrupted
from scaletrain.monitor import goodput
from scaletrain.monitor.meter import Meter, PeakMemory, Throughput
from scaletrain.monitor.phase_clock import STEP, WAIT, Phases
from scaletrain.monitor.recorder import Recorder
from scaletrain.program import Program, TrainState
from scaletrain.rollbacks import Diverged


@dataclasses.dataclass
class Loop:
    """The steps of one attempt, and what happens between them."""

    program: Program
    execute: Callable
    recorder: Recorder
    checkpoints: checkpoint.Store
    corpus: data.Corpus
    sequences: dict[str, Any]
    back: rollbacks.Rollbacks
    phases: Phases
    account: goodput.Account
    _pending: tuple[int, dict[str, Any], Any] | None = None  # step, numbers, when ready
    _clock: float = 0.0  # when the step that was counted last was ready
    _counted: int = 0
    _skips: list[rollbacks.Skip] = dataclasses.field(default_factory=list)  # in a row
    _saved: float = 0.0  # when the last save began, likewise
    _meters: tuple[Meter, ...] = ()

    def __post_init__(self) -> None:
        self._meters = (
            Throughput(self.program.run, jax.devices()),
            PeakMemory(jax.local_devices()),
        )

    def run(self, state: TrainState, start: int) -> dict[str, Any]:
        """Takes the steps after `start`; returns the last evaluation."""
        self.account.begin(start)
        try:
            found = self._run(state, start)
            self.account.finish()
            return found
        finally:
            total = self.account.total()
            say(goodput.in_words(total))
            self.recorder.write({"step": self._counted, **total})
            for meter in self._meters:
                meter.close()

    def _run(self, state: TrainState, start: int) -> dict[str, Any]:
        """Takes the steps.

        The order inside one matters to resuming: batch, step, records of the step
        before, checkpoint, evaluation.
        """
        run, left_out = self.program.run, self.back.left_out
        batches = input_pipeline.batches_of(
            self.program, self.sequences["train"], start, left_out
        )
        self._clock, self._counted = time.perf_counter(), start
        self._saved = time.monotonic()
        watch = concurrent.futures.ThreadPoolExecutor(1)
        found: dict[str, Any] = {}
        with watch, garbage_kept(), jax.transfer_guard("disallow"):
            if self._owes_evaluation(start):
                self._evaluate(start, state)
            for now in range(start + 1, run.num_steps + 1):
                last = now == run.num_steps
                with self.phases(STEP):
                    with jax.profiler.StepTraceAnnotation("train", step_num=now):
                        state, numbers = self._step(state, batches)
                    self.account.took(now)
                    # The device works on this step while the host reads the one before.
                    self._record()
                    self._pending = now, numbers, watch.submit(_ready_at, numbers)
                    self.checkpoints.check(together=_due(now, run.log_every_steps))
                    self._stop_if_asked(now, state)
                    if last or self._is_due(now):
                        self._record()
                        self._save(now, state, needed=last)
                if last or _due(now, run.eval_every_steps):
                    found = self._evaluate(now, state)
            return found or self._evaluate(start, state)

    def _owes_evaluation(self, start: int) -> bool:
        """Returns whether the attempt before ended after this step's evaluation began.

        Or before it did, once its step was saved. The last one is nobody's to owe: it
        is done anew whenever there is no step left.
        """
        run = self.program.run
        if not 0 < start < run.num_steps or not _due(start, run.eval_every_steps):
            return False
        return not cluster.decide(f"evaluated at {start}", self.recorder.evaluated)

    def _stop_if_asked(self, now: int, state: TrainState) -> None:
        """Saves and ends the attempt if a process was asked to; in all at this place.

        Raises:
          Interrupted: once the state after step `now` is durable.
        """
        since = cluster.stopped_since()
        if since is None:
            return
        self._record()
        self._save(now, state, needed=True)
        seconds = time.monotonic() - since
        self.recorder.write({"step": now, "stop_to_saved_s": seconds})
        raise Interrupted(
            f"stopped by a signal at step {now}; saved {seconds:.1f} s after it; "
            "the same command goes on from there."
        )

    def _is_due(self, now: int) -> bool:
        """Returns whether a checkpoint is due, by the step or by the first clock."""
        c, run = self.program.run.checkpoint, self.program.run
        if _due(now, c.every_steps):
            return True
        if not c.every_minutes or not _due(now, run.log_every_steps):
            return False
        late = time.monotonic() - self._saved >= 60 * c.every_minutes
        return cluster.decide(f"save at {now}", late)

    def _step(
        self, state: TrainState, batches: Iterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes one optimizer step."""
        with self.phases(WAIT):
            rows = next(batches)
        return self.execute(state, sharding.place(rows, self.program.batch))

    def _record(self) -> None:
        """Reads the pending step's numbers; logs, shows and judges them."""
        if self._pending is None:
            return
        (now, numbers, ready_at), self._pending = self._pending, None
        numbers = jax.device_get(numbers)
        run = self.program.run
        if now == run.num_steps or _due(now, run.log_every_steps):
            clock = ready_at.result()
            pace = (clock - self._clock) / (now - self._counted)
            self._clock, self._counted = clock, now
            record = {
                "step": now,
                "loss": float(numbers["loss"]),
                "grad_norm": float(numbers["grad_norm"]),
                "learning_rate": float(numbers["learning_rate"]),
                "tokens": now * run.batch_size * run.seq_len,
                "skipped": int(numbers["skipped"]),
                "rollbacks": len(self.back.records),
                "batch_hash": int(numbers["batch_hash"]),
            }
            for meter in self._meters:
                record |= meter.read(pace)
            self.recorder.write(record)
            self.recorder.progress(record)
            gc.collect()  # every process at the same step, while the devices work
        self._judge(now, numbers)

    def _judge(self, now: int, numbers: dict[str, Any]) -> None:
        """Tells of an update that was skipped; enough of them end this attempt."""
        in_a_row = int(numbers["skipped_in_a_row"])
        if not in_a_row:
            self._skips.clear()
            return
        documents: list[int] = []
        if self.recorder.lead:
            documents = input_pipeline.documents_of(
                self.program, self.sequences["train"], now, self.back.left_out
            )
        skip = rollbacks.skip_of(now, numbers, documents)
        self._skips.append(skip)
        record = {f"skip_{name}": value for name, value in skip.record().items()}
        self.recorder.write(record | {"step": now})
        say(str(skip))
        if in_a_row >= self.program.run.optim.max_skipped_steps:
            raise Diverged(now - in_a_row + 1, now, self._skips)

    def _save(self, now: int, state: TrainState, *, needed: bool) -> None:
        """Saves; the loop waits for the arrays to leave the device, if not longer."""
        began = time.monotonic()
        # What waits until all is written has nothing to do with the usual save.
        with self.phases("last save" if needed else "save"):
            self.checkpoints.save(
                now, state, self.corpus.fingerprint, self.back.brief(), needed=needed
            )
            self._saved = began
            if needed:
                self.checkpoints.finish()
        stall = {"step": now, "save_stall_s": time.monotonic() - began}
        self.recorder.write(stall | {"newest_saved": self.checkpoints.latest()})

    def _evaluate(self, now: int, state: TrainState) -> dict[str, Any]:
        """Returns the validation numbers; the time it takes is no step's."""
        self._record()
        with self.phases("eval"):
            found = evaluate.evaluate(
                self.program,
                state.weights,
                self.corpus,
                self.sequences["validation"],
                lambda: self._stop_if_asked(now, state),
            )
        self.recorder.write({"step": now, **{f"eval_{k}": v for k, v in found.items()}})
        if found and now < self.program.run.num_steps:
            say(f"step {now}: validation {evaluate.in_words(found)}")
        self._clock, self._counted = time.perf_counter(), now
        return {"step": now, **found}


@contextlib.contextmanager
def garbage_kept() -> Iterator[None]:
    """Keeps Python from collecting garbage by itself, and what is here from search.

    A process that stops for it keeps all others waiting, each at a time of its own.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def _ready_at(numbers: dict[str, Any]) -> float:
    """Returns when the device had them; reading them may come a step later."""
    jax.block_until_ready(numbers)
    return time.perf_counter()


def _due(now: int, every: int) -> bool:
    return bool(every) and now % every == 0
