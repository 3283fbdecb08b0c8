"""A training run, told from top to bottom."""

import concurrent.futures
import contextlib
import dataclasses
import gc
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from scaletrain import (
    checkpoint,
    cluster,
    config,
    data,
    evaluate,
    mesh,
    metrics,
    remat,
    rollbacks,
    sharding,
    step,
)
from scaletrain.config import RunConfig
from scaletrain.errors import Interrupted
from scaletrain.rollbacks import Diverged
from scaletrain.step import Program, TrainState


def say(line: str) -> None:
    """Tells the person at the terminal, once however many processes there are."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def run(run: RunConfig, workdir: str) -> dict[str, Any]:
    """Trains to `num_steps`, going on from the newest checkpoint of `workdir`.

    Returns:
      What the last evaluation found, see `evaluate.evaluate`.

    Raises:
      ScaletrainError: see `errors`; the workdir stays empty until settings, mesh and
        data are known to fit together.
    """
    # 1. Where: the devices that are here.
    run = config.resolve(run, jax.device_count())
    grid = mesh.build(run.mesh)
    folder = checkpoint.prepare_workdir(workdir)
    run = checkpoint.pinned(_as_begun(run, folder))
    # 2. What: the corpus as tokens, the step as a program.
    corpus = prepare(run)
    sequences = {s: data.sequences(corpus, s, run) for s in ("train", "validation")}
    program = step.build(run, grid)
    # 3. From where: the newest checkpoint, other weights, or the seed.
    checkpoints = checkpoint.Checkpoints(folder, run)
    with jax.set_mesh(grid), contextlib.closing(checkpoints):
        back = rollbacks.Rollbacks(folder, checkpoints, say)
        cluster.agree(
            {
                "the newest checkpoint": checkpoints.latest(),
                "the data": corpus.fingerprint,
                "what was left out": back.left_out,
            }
        )
        back.clear()
        start = checkpoints.latest()
        if start is not None:
            for line in checkpoints.agree(start, corpus.fingerprint):
                say(f"changed since step {start}: {line}")
        _leave_settings(folder, run, corpus)
        say(sharding.table(program.state.params))
        state = _first(program, checkpoints, start)
        program, execute = compiled(program, run)
        # 4. The loop, begun again where it goes back.
        while True:
            recorder = metrics.Recorder(folder, run, start or 0)
            with contextlib.closing(recorder):
                loop = Loop(
                    program, execute, recorder, checkpoints, corpus, sequences, back
                )
                try:
                    return loop.run(state, start or 0)
                except Diverged as err:
                    # Its frames hold the arrays of the state that is given up.
                    why = err.with_traceback(None)
            start = back.go_back(why)
            state = _first(program, checkpoints, start)


def prepare(run: RunConfig) -> data.Corpus:
    """Returns the corpus, read by one process of a host before the others look."""
    corpus = None
    for turn in range(3):
        if turn == cluster.turn():
            corpus = data.prepare(run, say)
        cluster.wait("corpus")
    assert corpus is not None, "every process has a turn"
    return corpus


def _leave_settings(folder: pathlib.Path, run: RunConfig, corpus: data.Corpus) -> None:
    """Writes what `eval` and `generate` need to know of the run."""
    if jax.process_index() == 0:
        (folder / "config.json").write_text(config.to_json(run), encoding="utf-8")
        if corpus.tokenizer is not None:
            corpus.tokenizer.save(folder / "tokenizer")


def _as_begun(run: RunConfig, folder: pathlib.Path) -> RunConfig:
    """Returns `run` with the step that `init_from` meant when the run began."""
    path = folder / "config.json"
    if not run.init_from or not path.is_file():
        return run
    then = config.from_json(path.read_text(encoding="utf-8")).init_from
    workdir = os.path.abspath(run.init_from)
    same = checkpoint.origin(then)[0] == workdir
    return dataclasses.replace(run, init_from=then) if same else run


def _first(
    program: Program, checkpoints: checkpoint.Checkpoints, start: int | None
) -> TrainState:
    """Returns the state that the first step of this attempt takes."""
    run, wanted = program.run, program.state
    frozen = checkpoint.initial_weights(run, wanted.frozen) if wanted.frozen else {}
    if start is not None and not checkpoints.is_import(start):
        say(f"resuming from step {start} of {checkpoints.folder}")
        return checkpoints.restore(start, dataclasses.replace(wanted, frozen=frozen))
    state = dataclasses.replace(_initial(program), frozen=frozen)
    if start is not None:
        say(f"starting from the import in {checkpoints.folder}")
        params = checkpoints.restore_params(start, wanted.params)
    elif run.init_from and not wanted.frozen:
        say(f"starting from the weights of {run.init_from}")
        params = checkpoint.initial_weights(run, wanted.params)
    else:
        return state
    return dataclasses.replace(state, params=params)


def _initial(program: Program) -> TrainState:
    """Returns the state of the seed, without what is frozen."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    layout = dataclasses.replace(layout, frozen={})

    def make() -> TrainState:
        state = step.initial_state(program.run, program.tx)
        return dataclasses.replace(state, frozen={})

    return jax.jit(make, out_shardings=layout)()


def compiled(program: Program, asked: RunConfig) -> tuple[Program, Any]:
    """Returns the program and its step; tells of what was decided for `asked`."""
    if asked.model.attention == "auto":
        say(f"attention: {program.run.model.attention} (auto)")
    began = time.perf_counter()
    program, execute = remat.compiled(program, say)
    say(f"compiled in {time.perf_counter() - began:.1f} s")
    return program, execute


def batches_of(
    program: Program,
    sequences: Any,
    start: int,
    left_out: Sequence[tuple[int, int]] = (),
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's rows of every batch after step `start`.

    Args:
      left_out: (step, batches): the steps after that one do without these batches.
    """
    run, layout = program.run, program.batch["tokens"]
    parts = run.batch_size // layout.shape[0]
    return data.training_batches(
        sequences,
        seed=run.seed,
        batch_size=layout.shape[0],
        rows=sharding.rows_here(layout),
        start_step=start * parts,
        left_out=[(step * parts, batches * parts) for step, batches in left_out],
    )


def documents_of(
    program: Program, sequences: Any, now: int, left_out: Sequence[tuple[int, int]]
) -> list[int]:
    """Returns the ids of the documents that step `now` reads, see `batches_of`."""
    run, rows = program.run, program.batch["tokens"].shape[0]
    parts = run.batch_size // rows
    found: set[int] = set()
    for part in range(parts):
        found |= data.training_documents(
            sequences,
            seed=run.seed,
            batch_size=rows,
            step=(now - 1) * parts + part,
            left_out=[(step * parts, batches * parts) for step, batches in left_out],
        )
    return sorted(found)


@dataclasses.dataclass
class Loop:
    """The steps of one attempt, and what happens between them."""

    program: Program
    execute: Callable
    recorder: metrics.Recorder
    checkpoints: checkpoint.Checkpoints
    corpus: data.Corpus
    sequences: dict[str, Any]
    back: rollbacks.Rollbacks
    _pending: tuple[int, dict[str, Any], Any] | None = None  # step, numbers, when ready
    _clock: float = 0.0  # when the step that was counted last was ready
    _counted: int = 0
    _skips: list[rollbacks.Skip] = dataclasses.field(default_factory=list)  # in a row

    def run(self, state: TrainState, start: int) -> dict[str, Any]:
        """Takes the steps after `start`; returns the last evaluation.

        The order inside a step matters to resuming: batch, step, records of the step
        before, checkpoint, evaluation.
        """
        run, left_out = self.program.run, self.back.left_out
        batches = batches_of(self.program, self.sequences["train"], start, left_out)
        self._clock, self._counted = time.perf_counter(), start
        watch = concurrent.futures.ThreadPoolExecutor(1)
        found: dict[str, Any] = {}
        with (
            watch,
            garbage_kept(),
            _stop_signals() as stopped,
            jax.transfer_guard("disallow"),
        ):
            for now in range(start + 1, run.num_steps + 1):
                with jax.profiler.StepTraceAnnotation("train", step_num=now):
                    state, numbers = self._step(state, batches)
                # The device works on this step while the host reads the one before.
                self._record()
                self._pending = now, numbers, watch.submit(_ready_at, numbers)
                self.checkpoints.check()
                last = now == run.num_steps
                if last or stopped() or _due(now, run.checkpoint.every_steps):
                    self._record()
                    self._save(now, state)
                if stopped() and not last:
                    self.checkpoints.finish()
                    raise Interrupted(
                        f"stopped by a signal at step {now}; saved; "
                        "the same command goes on from there."
                    )
                if last or _due(now, run.eval_every_steps):
                    found = self._evaluate(now, state)
        self.checkpoints.finish()
        return found or self._evaluate(start, state)

    def _step(
        self, state: TrainState, batches: Iterator
    ) -> tuple[TrainState, dict[str, Any]]:
        """Takes one optimizer step, of one batch or of its parts in turn."""
        hashes, numbers = [], {}
        parts = self.program.run.batch_size // self.program.batch["tokens"].shape[0]
        for _ in range(parts):
            batch = sharding.place(next(batches), self.program.batch)
            state, numbers = self.execute(state, batch)
            hashes.append(numbers["batch_hash"])
        return state, numbers | {"batch_hash": hashes}

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
                "batch_hash": int(sum(map(int, numbers["batch_hash"])) % 2**32),
                **metrics.throughput(run, pace, jax.devices()),
                "peak_memory_bytes": metrics.peak_memory_bytes(jax.local_devices()),
            }
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
            documents = documents_of(
                self.program, self.sequences["train"], now, self.back.left_out
            )
        skip = rollbacks.skip_of(now, numbers, documents)
        self._skips.append(skip)
        record = {f"skip_{name}": value for name, value in skip.record().items()}
        self.recorder.write(record | {"step": now})
        say(str(skip))
        if in_a_row >= self.program.run.optim.max_skipped_steps:
            raise Diverged(now - in_a_row + 1, now, self._skips)

    def _save(self, now: int, state: TrainState) -> None:
        if now != self.checkpoints.latest():
            self.checkpoints.save(
                now, state, self.corpus.fingerprint, self.back.brief()
            )

    def _evaluate(self, now: int, state: TrainState) -> dict[str, Any]:
        """Returns the validation numbers; the time it takes is no step's."""
        self._record()
        found = evaluate.evaluate(
            self.program, state.weights, self.corpus, self.sequences["validation"]
        )
        self.recorder.write({"step": now, **{f"eval_{k}": v for k, v in found.items()}})
        if found and now < self.program.run.num_steps:
            say(f"step {now}: validation {evaluate.in_words(found)}")
        self._clock, self._counted = time.perf_counter(), now
        return {"step": now, **found}


def _ready_at(numbers: dict[str, Any]) -> float:
    """Returns when the device had them; reading them may come a step later."""
    jax.block_until_ready(numbers)
    return time.perf_counter()


def _due(now: int, every: int) -> bool:
    return bool(every) and now % every == 0


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


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Turns the first SIGTERM or SIGINT into a request to stop after this step.

    A second one ends the process at once. Several processes would have to agree on
    the step; they keep the default, which ends them all.
    """
    caught: list[int] = []
    if jax.process_count() > 1:
        yield lambda: False
        return

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        say("stopping after this step; a second signal stops at once")
        signal.signal(number, signal.SIG_DFL)

    before = {n: signal.signal(n, catch) for n in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: bool(caught)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
