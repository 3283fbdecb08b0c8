"""The loop of one attempt: steps, and the records, saves and evaluations between."""

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
    sharding,
)
from scaletrain.console import say
from scaletrain.errors import Interrupted
from scaletrain.monitor import goodput
from scaletrain.monitor.meter import Meter, PeakMemory, Throughput
from scaletrain.monitor.phase_clock import STEP, WAIT, Phases
from scaletrain.monitor.recorder import Recorder
from scaletrain.program import Program, TrainState
from scaletrain.rollbacks import Diverged, Rollbacks, Skip, skip_of


@dataclasses.dataclass
class Loop:
    """The loop of one attempt.

    Args:
      program: the train step with its shapes.
      execute: the compiled train step: (state, batch) -> (state, numbers).
      recorder: of metrics.jsonl.
      checkpoints: of the run.
      corpus: the data; evaluations count its bytes.
      sequences: of the splits "train" and "validation".
      rollbacks: of the run; their batches are left out.
      phases: the clock of this attempt.
      account: of the time that attempts take.
    """

    program: Program
    execute: Callable
    recorder: Recorder
    checkpoints: checkpoint.Store
    corpus: data.Corpus
    sequences: dict[str, Any]
    rollbacks: Rollbacks
    phases: Phases
    account: goodput.Account
    # The newest step, its numbers, and a future of the time they were ready.
    _pending: tuple[int, dict[str, Any], Any] | None = None
    _clock: float = 0.0  # `perf_counter` when the newest recorded step was ready
    _counted: int = 0  # that step
    _skips: list[Skip] = dataclasses.field(default_factory=list)  # in a row
    _saved: float = 0.0  # `monotonic` when the newest save began
    _meters: tuple[Meter, ...] = ()

    def __post_init__(self) -> None:
        self._meters = (
            Throughput(self.program.run, jax.devices()),
            PeakMemory(jax.local_devices()),
        )

    def run(self, state: TrainState, start: int) -> dict[str, Any]:
        """Returns the last evaluation, after the steps from `start` to `num_steps`."""
        self.account.begin(start)
        try:
            evaluation = self._run(state, start)
            self.account.finish()
            return evaluation
        finally:
            total = self.account.total()
            say(goodput.in_words(total))
            self.recorder.write({"step": self._counted, **total})
            for meter in self._meters:
                meter.close()

    def _run(self, state: TrainState, start: int) -> dict[str, Any]:
        """Takes the steps; returns as `run` does.

        The order inside a step matters to resuming: batch, step, records of the step
        before, checkpoint, evaluation.
        """
        run, left_out = self.program.run, self.rollbacks.left_out
        batches = input_pipeline.batches_of(
            self.program, self.sequences["train"], start, left_out
        )
        self._clock, self._counted = time.perf_counter(), start
        self._saved = time.monotonic()
        watch = concurrent.futures.ThreadPoolExecutor(1)
        evaluation: dict[str, Any] = {}
        with watch, manual_collection(), jax.transfer_guard("disallow"):
            if self._owes_evaluation(start):
                self._evaluate(start, state)
            for step in range(start + 1, run.num_steps + 1):
                last = step == run.num_steps
                with self.phases(STEP):
                    with jax.profiler.StepTraceAnnotation("train", step_num=step):
                        state, numbers = self._step(state, batches)
                    self.account.took(step)
                    # The device works on this step while the host reads the one before.
                    self._record()
                    self._pending = step, numbers, watch.submit(_ready_at, numbers)
                    self.checkpoints.check(together=_due(step, run.log_every_steps))
                    self._stop_if_asked(step, state)
                    if last or self._is_due(step):
                        self._record()
                        self._save(step, state, needed=last)
                if last or _due(step, run.eval_every_steps):
                    evaluation = self._evaluate(step, state)
            return evaluation or self._evaluate(start, state)

    def _owes_evaluation(self, start: int) -> bool:
        """Returns whether step `start` was saved but its evaluation was not recorded.

        The attempt before ended in between. This never holds for the last step: it is
        evaluated again whenever no step is left.
        """
        run = self.program.run
        if not 0 < start < run.num_steps or not _due(start, run.eval_every_steps):
            return False
        return not cluster.decide(f"evaluated at {start}", self.recorder.evaluated)

    def _stop_if_asked(self, step: int, state: TrainState) -> None:
        """Saves and ends the attempt, in all processes, if a signal asked one of them.

        Raises:
          Interrupted: once the state after `step` is durable.
        """
        since = cluster.stopped_since()
        if since is None:
            return
        self._record()
        self._save(step, state, needed=True)
        seconds = time.monotonic() - since
        self.recorder.write({"step": step, "stop_to_saved_s": seconds})
        raise Interrupted(
            f"stopped by a signal at step {step}; saved {seconds:.1f} s after it; "
            "the same command goes on from there."
        )

    def _is_due(self, step: int) -> bool:
        """Returns whether a checkpoint is due, by step or by the clock of process 0.

        The clock is asked only at logged steps, since processes wait for its answer.
        """
        c, run = self.program.run.checkpoint, self.program.run
        if _due(step, c.every_steps):
            return True
        if not c.every_minutes or not _due(step, run.log_every_steps):
            return False
        late = time.monotonic() - self._saved >= 60 * c.every_minutes
        return cluster.decide(f"save at {step}", late)

    def _step(
        self, state: TrainState, batches: Iterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """Returns the state and the numbers of one optimizer step."""
        with self.phases(WAIT):
            rows = next(batches)
        return self.execute(state, sharding.place(rows, self.program.batch))

    def _record(self) -> None:
        """Reads the numbers of the pending step; records, shows and judges them."""
        if self._pending is None:
            return
        (step, numbers, ready_at), self._pending = self._pending, None
        numbers = jax.device_get(numbers)
        run = self.program.run
        if step == run.num_steps or _due(step, run.log_every_steps):
            clock = ready_at.result()
            step_time_s = (clock - self._clock) / (step - self._counted)
            self._clock, self._counted = clock, step
            record = {
                "step": step,
                "loss": float(numbers["loss"]),
                "grad_norm": float(numbers["grad_norm"]),
                "learning_rate": float(numbers["learning_rate"]),
                "tokens": step * run.batch_size * run.seq_len,
                "skipped": int(numbers["skipped"]),
                "rollbacks": len(self.rollbacks.records),
                "batch_hash": int(numbers["batch_hash"]),
            }
            for meter in self._meters:
                record |= meter.read(step_time_s)
            self.recorder.write(record)
            self.recorder.progress(record)
            gc.collect()  # every process at the same step, while the devices work
        self._judge(step, numbers)

    def _judge(self, step: int, numbers: dict[str, Any]) -> None:
        """Records a skipped update.

        Raises:
          Diverged: `optim.max_skipped_steps` in a row were skipped.
        """
        in_a_row = int(numbers["skipped_in_a_row"])
        if not in_a_row:
            self._skips.clear()
            return
        documents: list[int] = []
        if self.recorder.lead:
            documents = input_pipeline.documents_of(
                self.program, self.sequences["train"], step, self.rollbacks.left_out
            )
        skip = skip_of(step, numbers, documents)
        self._skips.append(skip)
        record = {f"skip_{name}": value for name, value in skip.record().items()}
        self.recorder.write(record | {"step": step})
        say(str(skip))
        if in_a_row >= self.program.run.optim.max_skipped_steps:
            raise Diverged(step - in_a_row + 1, step, self._skips)

    def _save(self, step: int, state: TrainState, *, needed: bool) -> None:
        """Saves the state after `step`.

        Args:
          step: its number.
          state: the state after it.
          needed: wait until the save is durable, not only until the arrays are copied.
        """
        began = time.monotonic()
        # A needed save waits for the disk: its time would hide that of the usual ones.
        with self.phases("last save" if needed else "save"):
            self.checkpoints.save(
                step,
                state,
                self.corpus.fingerprint,
                self.rollbacks.brief(),
                needed=needed,
            )
            self._saved = began
            if needed:
                self.checkpoints.finish()
        stall = {"step": step, "save_stall_s": time.monotonic() - began}
        self.recorder.write(stall | {"newest_saved": self.checkpoints.latest()})

    def _evaluate(self, step: int, state: TrainState) -> dict[str, Any]:
        """Returns the validation numbers after `step`."""
        self._record()
        with self.phases("eval"):
            numbers = evaluate.evaluate(
                self.program,
                state.weights,
                self.corpus,
                self.sequences["validation"],
                lambda: self._stop_if_asked(step, state),
            )
        record = {f"eval_{name}": value for name, value in numbers.items()}
        self.recorder.write({"step": step, **record})
        if numbers and step < self.program.run.num_steps:
            say(f"step {step}: validation {evaluate.in_words(numbers)}")
        # The time of an evaluation must not count as the time of a step.
        self._clock, self._counted = time.perf_counter(), step
        return {"step": step, **numbers}


@contextlib.contextmanager
def manual_collection() -> Iterator[None]:
    """Turns automatic garbage collection off, and exempts the objects that exist now.

    A process that pauses to collect keeps all others waiting, and each would pause at
    another time. The loop collects at logged steps, in all processes together.
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
    """Returns the time when the numbers are ready; they may be read later."""
    jax.block_until_ready(numbers)
    return time.perf_counter()


def _due(step: int, every: int) -> bool:
    return bool(every) and step % every == 0
