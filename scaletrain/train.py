"""A training run, told from top to bottom."""

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
    rollbacks,
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
from scaletrain.rollbacks import Diverged
from scaletrain.workdir import Workdir


def run(run: RunConfig, workdir: str, phases: Phases | None = None) -> dict[str, Any]:
    """Trains to `num_steps`, going on from the newest checkpoint of `workdir`.

    Args:
      phases: the clock of this attempt; by default it starts here.

    Returns:
      What the last evaluation found, see `evaluate.evaluate`: one of before where
        the run has already gone further than `num_steps`.

    Raises:
      ScaletrainError: see `errors`; the workdir stays empty until settings, mesh and
        data are known to fit together.
    """
    phases = phases or Phases()
    # 1. Where: the devices that are here.
    run = config.resolve(run, jax.device_count())
    grid = mesh.build(run.mesh)
    folder = workdirs.prepare(workdir)
    run = warm_start.pinned(_as_begun(run, folder))
    # 2. What: the corpus as tokens, the step as a program.
    with signals.at_once(), phases("data"):
        corpus = input_pipeline.prepare(
            run, warm_start.tokenizer_begun_with(run, folder)
        )
        sequences = {s: data.sequences(corpus, s, run) for s in ("train", "validation")}
    program = build(run, grid)
    with contextlib.ExitStack() as held:
        held.enter_context(jax.set_mesh(grid))
        if jax.process_index() == 0:
            held.enter_context(locked(folder, say))
            phases.tell(folder)
        held.enter_context(Watchdog(phases, folder, run.watchdog_s))
        # 3. From where: the newest checkpoint, other weights, or the seed.
        with signals.at_once():
            _not_anew(folder)
            checkpoints = checkpoint.Store(folder, run, say=say)
            held.enter_context(contextlib.closing(checkpoints))
            with checkpoints.reserved(program.state) as reserved:
                with phases("check"):
                    checkpoints.newest_undamaged()
                    back = rollbacks.Rollbacks(folder, checkpoints, say)
                    start = _agreed(checkpoints, back, corpus, program)
                    if start is not None and start > run.num_steps:
                        return _nothing_to_do(folder, run, start)
                    _leave_settings(folder, run, corpus)
                    account = held.enter_context(goodput.Account(folder, phases))
                    say(sharding.table(program.state.params))
                with phases("compile"):
                    program, execute = compilation.decided(program, run, reserved)
            with phases("init" if start is None else "restore"):
                state = _first(program, checkpoints, start)
        # 4. The loop, begun again where it goes back.
        while True:
            with workdirs.writing(folder):
                recorder = Recorder(folder, run, start or 0)
            with contextlib.closing(recorder):
                loop = Loop(
                    program, execute, recorder, checkpoints, corpus, sequences, back,
                    phases, account,
                )  # fmt: skip
                try:
                    return loop.run(state, start or 0)
                except Diverged as err:
                    # Its frames hold the arrays of the state that is given up.
                    why = err.with_traceback(None)
            with phases("restore"):
                start = back.go_back(why)
                state = _first(program, checkpoints, start)


def _not_anew(folder: Workdir) -> None:
    """Refuses a workdir whose checkpoints are gone, before there is a folder for them.

    One that was moved back would else end up inside it.
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


def _agreed(
    checkpoints: checkpoint.Store,
    back: rollbacks.Rollbacks,
    corpus: data.Corpus,
    program: Program,
) -> int | None:
    """Returns the step to go on from, which all processes and settings agree on."""
    cluster.agree(
        {
            "the newest checkpoint": checkpoints.latest(),
            "the data": corpus.fingerprint,
            "what was left out": back.left_out,
        }
    )
    start = back.clear()
    if start is not None:
        for line in checkpoints.agree(start, program.state, corpus.fingerprint):
            say(f"changed since step {start}: {line}")
    return start


def _nothing_to_do(folder: Workdir, run: RunConfig, step: int) -> dict[str, Any]:
    """Returns the newest evaluation of a run that is further on than `num_steps`."""
    say(
        f"num_steps={run.num_steps}; nothing to do: {folder} is at step {step} and "
        "keeps its settings; to train on, give more steps than that."
    )
    return folder.newest_evaluation(step)


def _leave_settings(folder: Workdir, run: RunConfig, corpus: data.Corpus) -> None:
    """Writes what `eval` and `generate` need to know of the run."""
    if jax.process_index() == 0:
        with workdirs.writing(folder):
            atomic_write(folder.config, config.to_json(run).encode())
            if corpus.tokenizer is not None:
                corpus.tokenizer.save(folder.tokenizer)


def _as_begun(run: RunConfig, folder: Workdir) -> RunConfig:
    """Returns `run` with the step that `init_from` meant when the run began."""
    path = folder.config
    if not run.init_from or not path.is_file():
        return run
    then = config.from_json(path.read_text("utf-8", "replace"), str(path)).init_from
    workdir = os.path.abspath(run.init_from)
    same = warm_start.parsed(then)[0] == workdir
    return dataclasses.replace(run, init_from=then) if same else run


def _first(
    program: Program, checkpoints: checkpoint.Store, start: int | None
) -> TrainState:
    """Returns the state that the first step of this attempt takes."""
    run, wanted = program.run, program.state
    frozen = warm_start.initial_weights(run, wanted.frozen) if wanted.frozen else {}
    if start is not None and not checkpoints.is_import(start):
        say(f"resuming from step {start} of {checkpoints.folder}")
        return checkpoints.restore(start, dataclasses.replace(wanted, frozen=frozen))
    state = dataclasses.replace(initial(program, with_frozen=False), frozen=frozen)
    if start is not None:
        say(f"starting from the import in {checkpoints.folder}")
        params = checkpoints.restore_params(start, wanted.params)
    elif run.init_from and not wanted.frozen:
        say(f"starting from the weights of {run.init_from}")
        params = warm_start.initial_weights(run, wanted.params)
    else:
        return state
    return dataclasses.replace(state, params=params)
