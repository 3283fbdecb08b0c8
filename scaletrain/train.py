"""A training run from top to bottom."""

import contextlib
import dataclasses
import os
from typing import Any

import jax

from scaletrain import (
    checkpoint,
    cluster,
    compilation,
    config,
    data,
    input_pipeline,
    mesh,
    sharding,
)
from scaletrain import workdir as workdirs
from scaletrain.checkpoint import warm_start
from scaletrain.cluster import signals
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.errors import ConfigError
from scaletrain.files import atomic_write
from scaletrain.lock import locked
from scaletrain.loop import Loop
from scaletrain.monitor import goodput
from scaletrain.monitor.phase_clock import Phases
from scaletrain.monitor.recorder import Recorder
from scaletrain.monitor.watchdog import Watchdog
from scaletrain.program import Program, TrainState, build, initial
from scaletrain.rollbacks import Diverged, Rollbacks
from scaletrain.workdir import Workdir


def train(run: RunConfig, workdir: str, phases: Phases | None = None) -> dict[str, Any]:
    """Returns the last evaluation of a run that is trained to `num_steps`.

    Training goes on from the newest checkpoint of `workdir`. The evaluation is as in
    `evaluate.evaluate`; a run that is already past `num_steps` has an earlier one.

    Args:
      run: the settings, not yet resolved to a number of devices.
      workdir: the folder of the run, made if missing.
      phases: the clock of this attempt; by default it starts now.

    Raises:
      ScaletrainError: see `errors`; the workdir stays empty until settings, mesh and
        data are known to fit together.
    """
    phases = phases or Phases()
    # 1. The settings on the present devices.
    run = config.resolve(run, jax.device_count())
    devices = mesh.build(run.mesh)
    folder = workdirs.make_workdir(workdir)
    run = warm_start.pinned(_as_begun(run, folder))
    # 2. The corpus as tokens, the step as a program.
    with signals.at_once(), phases("data"):
        corpus = input_pipeline.prepare(
            run, warm_start.tokenizer_begun_with(run, folder)
        )
        sequences = {s: data.sequences(corpus, s, run) for s in ("train", "validation")}
    program = build(run, devices)
    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.set_mesh(devices))
        if jax.process_index() == 0:
            stack.enter_context(locked(folder, say))
            phases.tell(folder)
        stack.enter_context(Watchdog(phases, folder, run.watchdog_s))
        # 3. The first state: the newest checkpoint, other weights, or the seed.
        with signals.at_once():
            _refuse_lost_checkpoints(folder)
            checkpoints = checkpoint.Store(folder, run, say=say)
            stack.enter_context(contextlib.closing(checkpoints))
            with checkpoints.reserved(program.state) as reserved:
                with phases("check"):
                    checkpoints.newest_undamaged()  # sets damaged steps aside
                    rollbacks = Rollbacks(folder, checkpoints, say)
                    start = _agreed_start(checkpoints, rollbacks, corpus, program)
                    if start is not None and start > run.num_steps:
                        return _nothing_to_do(folder, run, start)
                    _leave_settings(folder, run, corpus)
                    account = stack.enter_context(goodput.Account(folder, phases))
                    say(sharding.table(program.state.params))
                with phases("compile"):
                    program, execute = compilation.decided(program, run, reserved)
            with phases("init" if start is None else "restore"):
                state = _first_state(program, checkpoints, start)
        # 4. The loop, again after each rollback.
        while True:
            with workdirs.as_checkpoint_error(folder):
                recorder = Recorder(folder, run, start or 0)
            with contextlib.closing(recorder):
                loop = Loop(
                    program, execute, recorder, checkpoints, corpus, sequences,
                    rollbacks, phases, account,
                )  # fmt: skip
                try:
                    return loop.run(state, start or 0)
                except Diverged as err:
                    # The frames of the traceback keep the abandoned state in memory.
                    diverged = err.with_traceback(None)
            with phases("restore"):
                start = rollbacks.go_back(diverged)
                state = _first_state(program, checkpoints, start)


def _refuse_lost_checkpoints(folder: Workdir) -> None:
    """Raises ConfigError if the checkpoints that metrics.jsonl records are gone.

    This comes before `checkpoints/` is made: a folder of that name that the user moves
    back would otherwise end up inside the new one.
    """
    saved = folder.newest_saved()
    if saved is not None and not folder.steps():
        raise ConfigError(
            [
                f"--workdir={folder}; metrics.jsonl tells of step {saved} saved, and "
                "checkpoints/ has no step; bring it back (is it mounted?), or remove "
                "metrics.jsonl to begin anew."
            ]
        )


def _agreed_start(
    checkpoints: checkpoint.Store,
    rollbacks: Rollbacks,
    corpus: data.Corpus,
    program: Program,
) -> int | None:
    """Returns the step to go on from, the same in all processes.

    Its settings agree with those of the run. None where there is no checkpoint.
    """
    cluster.agree(
        {
            "the newest checkpoint": checkpoints.latest(),
            "the data": corpus.fingerprint,
            "what was left out": rollbacks.left_out,
        }
    )
    start = rollbacks.remove_abandoned()
    if start is not None:
        for line in checkpoints.agree(start, program.state, corpus.fingerprint):
            say(f"changed since step {start}: {line}")
    return start


def _nothing_to_do(folder: Workdir, run: RunConfig, step: int) -> dict[str, Any]:
    """Returns the newest evaluation of a run that is already past `num_steps`."""
    say(
        f"num_steps={run.num_steps}; nothing to do: {folder} is at step {step} and "
        "keeps its settings; to train on, give more steps than that."
    )
    return folder.newest_evaluation(step)


def _leave_settings(folder: Workdir, run: RunConfig, corpus: data.Corpus) -> None:
    """Writes the settings and the tokenizer, which other commands read."""
    if jax.process_index() == 0:
        with workdirs.as_checkpoint_error(folder):
            atomic_write(folder.config, config.to_json(run).encode())
            if corpus.tokenizer is not None:
                corpus.tokenizer.save(folder.tokenizer)


def _as_begun(run: RunConfig, folder: Workdir) -> RunConfig:
    """Returns `run` with the step of `init_from` that its first start has chosen."""
    path = folder.config
    if not run.init_from or not path.is_file():
        return run
    stored = config.from_json(path.read_text("utf-8", "replace"), str(path)).init_from
    workdir = os.path.abspath(run.init_from)
    same = warm_start.parsed(stored)[0] == workdir
    return dataclasses.replace(run, init_from=stored) if same else run


def _first_state(
    program: Program, checkpoints: checkpoint.Store, start: int | None
) -> TrainState:
    """Returns the state before the first step of an attempt.

    Args:
      program: with the shapes and shardings of the state.
      checkpoints: of the run.
      start: the checkpoint to restore; None for `init_from`, or random weights.
    """
    run, shapes = program.run, program.state
    frozen = warm_start.initial_weights(run, shapes.frozen) if shapes.frozen else {}
    if start is not None and not checkpoints.is_import(start):
        say(f"resuming from step {start} of {checkpoints.folder}")
        return checkpoints.restore(start, dataclasses.replace(shapes, frozen=frozen))
    state = dataclasses.replace(initial(program, with_frozen=False), frozen=frozen)
    if start is not None:
        say(f"starting from the import in {checkpoints.folder}")
        params = checkpoints.restore_params(start, shapes.params)
    elif run.init_from and not shapes.frozen:
        say(f"starting from the weights of {run.init_from}")
        params = warm_start.initial_weights(run, shapes.params)
    else:
        return state
    return dataclasses.replace(state, params=params)
