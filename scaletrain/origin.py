"""Weights of other workdirs: what a run begins from, and what a command reads."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from scaletrain.checkpoint import Checkpoints, reading
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.program import TrainState
from scaletrain.workdir import Workdir

Tree = Any


def weights_of(
    workdir: str, run: RunConfig, step: int | None, state: TrainState
) -> tuple[int, Tree]:
    """Returns a step (default: the newest) and its weights laid out like `state`.

    Raises:
      CheckpointError: the workdir holds no such checkpoint, or one of another model.
    """
    with reading(workdir, run, step) as (checkpoints, step):
        return step, weights_in(checkpoints, step, state)


def weights_in(checkpoints: Checkpoints, step: int, state: TrainState) -> Tree:
    """Returns the weights of a step laid out like `state`, see `weights_of`."""
    params = checkpoints.restore_params(step, state.params)
    begun_from = checkpoints.settings(step).init_from
    run = dataclasses.replace(checkpoints.run, init_from=begun_from)
    frozen = initial_weights(run, state.frozen) if state.frozen else {}
    return dataclasses.replace(state, params=params, frozen=frozen).weights


def initial_weights(run: RunConfig, weights: Tree) -> Tree:
    """Returns the weights of `init_from`, laid out like `weights`.

    Raises:
      CheckpointError: they are not where init_from says.
    """
    with _reading_origin(run) as (checkpoints, step):
        return checkpoints.restore_params(step, weights)


@contextlib.contextmanager
def _reading_origin(run: RunConfig) -> Iterator[tuple[Checkpoints, int]]:
    """Yields what `reading` yields of `init_from`, and names it in what is raised."""
    workdir, step = parsed(run.init_from)
    if not Workdir.of(workdir).checkpoints.is_dir():
        raise CheckpointError(
            f"init_from={run.init_from}; no checkpoint there; "
            "give the workdir of an import or of a run."
        )
    try:
        with reading(workdir, run, step) as found:
            yield found
    except CheckpointError as err:
        raise CheckpointError(f"init_from={run.init_from}; {err}") from err


def parsed(init_from: str) -> tuple[str, int | None]:
    """Returns the workdir and the step, if it has one, of WORKDIR or WORKDIR@STEP."""
    workdir, at, step = init_from.rpartition("@")
    return (workdir, int(step)) if at and step.isdigit() else (init_from, None)


def pinned(run: RunConfig) -> RunConfig:
    """Returns `run` with the step in `init_from`, so that it means one thing for good.

    Raises:
      CheckpointError: there is no checkpoint, or none of whole weights.
    """
    if not run.init_from:
        return run
    with _reading_origin(run) as (checkpoints, step):
        if checkpoints.settings(step).lora.rank:
            raise CheckpointError(
                "it holds adapters without the weights beside them; export it with "
                "--merge, import that and start from there."
            )
    workdir = os.path.abspath(parsed(run.init_from)[0])
    return dataclasses.replace(run, init_from=f"{workdir}@{step}")
