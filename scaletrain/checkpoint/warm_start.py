"""Weights of other workdirs, for `init_from` and commands, and their tokenizer."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

from scaletrain import config, data
from scaletrain.checkpoint.reader import Reader, reading
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError, ConfigError
from scaletrain.program import TrainState
from scaletrain.workdir import Workdir

Tree = Any


def weights_of(
    workdir: str, run: RunConfig, step: int | None, state: TrainState
) -> tuple[int, Tree]:
    """Returns a step and its weights, sharded like `state`.

    Args:
      workdir: the folder of a run or an import.
      run: the settings to restore under.
      step: the step to read; None for the newest.
      state: the shapes and shardings.

    Raises:
      CheckpointError: the workdir holds no such checkpoint, or one of another model.
    """
    checkpoints, step = reading(workdir, run, step)
    return step, weights_in(checkpoints, step, state)


def weights_in(checkpoints: Reader, step: int, state: TrainState) -> Tree:
    """Returns the weights of a step, sharded like `state`.

    Args:
      checkpoints: of the workdir.
      step: a verified step.
      state: the shapes and shardings, of adapters beside frozen weights or of weights.
    """
    params = checkpoints.restore_params(step, state.params)
    # Adapters are saved without their frozen weights, which lie where that run began.
    init_from = checkpoints.settings(step).init_from
    run = dataclasses.replace(checkpoints.run, init_from=init_from)
    frozen = initial_weights(run, state.frozen) if state.frozen else {}
    return dataclasses.replace(state, params=params, frozen=frozen).weights


def initial_weights(run: RunConfig, weights: Tree) -> Tree:
    """Returns the weights of `init_from`, sharded like `weights`.

    Raises:
      CheckpointError: `init_from` names no such checkpoint.
    """
    checkpoints, step = _origin(run)
    with _named(run):
        return checkpoints.restore_params(step, weights)


def _origin(run: RunConfig) -> tuple[Reader, int]:
    """Returns the checkpoints and the verified step that `init_from` names."""
    workdir, step = parsed(run.init_from)
    if not _is_workdir(workdir):
        raise CheckpointError(
            f"init_from={run.init_from}; no checkpoint there; "
            "give the workdir of an import or of a run."
        )
    with _named(run):
        return reading(workdir, run, step)


@contextlib.contextmanager
def _named(run: RunConfig) -> Iterator[None]:
    """Adds `init_from` to the errors of its checkpoints."""
    try:
        yield
    except CheckpointError as err:
        raise CheckpointError(f"init_from={run.init_from}; {err}") from err


def parsed(init_from: str) -> tuple[str, int | None]:
    """Returns the workdir and the step of WORKDIR or WORKDIR@STEP.

    The step is None where none is given.
    """
    workdir, separator, step = init_from.rpartition("@")
    if not separator or not step.isdecimal():
        return init_from, None
    # The name of a workdir may itself end in @ and digits.
    if not _is_workdir(workdir) and _is_workdir(init_from):
        return init_from, None
    return workdir, int(step)


def _is_workdir(path: str) -> bool:
    return Workdir.of(path).checkpoints.is_dir()


def pinned(run: RunConfig) -> RunConfig:
    """Returns `run` with the step added to `init_from`.

    Otherwise `init_from` would mean another checkpoint once its run has saved again.

    Raises:
      CheckpointError: there is no checkpoint, or it holds adapters alone.
    """
    if not run.init_from:
        return run
    checkpoints, step = _origin(run)
    with _named(run):
        if checkpoints.settings(step).lora.rank:
            raise CheckpointError(
                "it holds adapters without the weights beside them; export it with "
                "--merge, import that and start from there."
            )
    workdir = os.path.abspath(parsed(run.init_from)[0])
    return dataclasses.replace(run, init_from=f"{workdir}@{step}")


def tokenizer_begun_with(run: RunConfig, folder: Workdir) -> data.Tokenizer | None:
    """Returns the tokenizer of the weights that training in `folder` starts from.

    None if it starts from random weights, or from weights that have seen no text.

    Raises:
      ScaletrainError: see `tokenizer_of`.
    """
    if folder.steps():
        return tokenizer_of(str(folder), run)
    return tokenizer_of(parsed(run.init_from)[0], run) if run.init_from else None


def tokenizer_of(workdir: str, run: RunConfig) -> data.Tokenizer | None:
    """Returns the tokenizer with which checkpoints in `workdir` read text.

    It is the workdir's own copy, even if the original file has changed. If `run` names
    another tokenizer, it is that one, provided that it keeps the meaning of each id of
    the copy. None for a workdir that has seen no text.

    Raises:
      ConfigError: `run` names a tokenizer with other ids.
      DataError: a tokenizer cannot be read.
    """
    folder, given, stored = Workdir.of(workdir), run.data, run.data
    settings = folder.config
    if settings.is_file():
        text = settings.read_text("utf-8", "replace")
        stored = config.from_json(text, str(settings)).data
    has_copy = (folder.tokenizer / "about.json").is_file()
    if not has_copy and stored.source == "synthetic":
        if given.source != "synthetic" and given.tokenizer == "bpe":
            raise _other_ids(
                run, workdir, "give the path of the tokenizer they were made with"
            )
        return None
    own = data.load_tokenizer(folder.tokenizer)
    same = (given.tokenizer, given.end_of_text) == (
        stored.tokenizer,
        stored.end_of_text,
    )
    if given.source == "synthetic" or same:
        return own
    named = data.read_tokenizer(given)
    if named and own.vocabulary().items() <= named.vocabulary().items():
        return named
    raise _other_ids(run, workdir, f"set it back to {stored.tokenizer!r}")


def _other_ids(run: RunConfig, workdir: str, remedy: str) -> ConfigError:
    """Returns the error for a tokenizer with other ids."""
    return ConfigError(
        [
            f"data.tokenizer={run.data.tokenizer!r}; its ids would not be those that "
            f"the checkpoints in {workdir} know; {remedy}."
        ]
    )
