"""What a run begins from and a command reads: weights, and the tokenizer they know."""

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
    """Returns a step (default: the newest) and its weights laid out like `state`.

    Raises:
      CheckpointError: the workdir holds no such checkpoint, or one of another model.
    """
    checkpoints, step = reading(workdir, run, step)
    return step, weights_in(checkpoints, step, state)


def weights_in(checkpoints: Reader, step: int, state: TrainState) -> Tree:
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
    checkpoints, step = _origin(run)
    with _named(run):
        return checkpoints.restore_params(step, weights)


def _origin(run: RunConfig) -> tuple[Reader, int]:
    """Returns the checkpoints that `init_from` names and its step, see `reading`."""
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
    """Names `init_from` in the errors of its checkpoints."""
    try:
        yield
    except CheckpointError as err:
        raise CheckpointError(f"init_from={run.init_from}; {err}") from err


def parsed(init_from: str) -> tuple[str, int | None]:
    """Returns the workdir and the step, if it has one, of WORKDIR or WORKDIR@STEP.

    A folder of a run may have a name that ends like a step.
    """
    workdir, at, step = init_from.rpartition("@")
    if not at or not step.isdecimal():
        return init_from, None
    if not _is_workdir(workdir) and _is_workdir(init_from):
        return init_from, None
    return workdir, int(step)


def _is_workdir(path: str) -> bool:
    return Workdir.of(path).checkpoints.is_dir()


def pinned(run: RunConfig) -> RunConfig:
    """Returns `run` with the step in `init_from`, so that it means one thing for good.

    Raises:
      CheckpointError: there is no checkpoint, or none of whole weights.
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
    """Returns the tokenizer of the weights that training in `folder` goes on from.

    None if it begins from none, or if they have seen no text.

    Raises:
      ScaletrainError: see `tokenizer_of`.
    """
    if folder.steps():
        return tokenizer_of(str(folder), run)
    return tokenizer_of(parsed(run.init_from)[0], run) if run.init_from else None


def tokenizer_of(workdir: str, run: RunConfig) -> data.Tokenizer | None:
    """Returns the tokenizer with which checkpoints in `workdir` read text.

    That is the workdir's own, whatever has become of the file it came from. If `run`
    names another, then that one, provided each id means in it what it meant. None of
    a workdir that has seen no text.

    Raises:
      ConfigError: `run` names a tokenizer of other ids.
      DataError: a tokenizer cannot be read.
    """
    folder, now, then = Workdir.of(workdir), run.data, run.data
    settings = folder.config
    if settings.is_file():
        text = settings.read_text("utf-8", "replace")
        then = config.from_json(text, str(settings)).data
    without = not (folder.tokenizer / "about.json").is_file()
    if without and then.source == "synthetic":
        if now.source != "synthetic" and now.tokenizer == "bpe":
            raise _other_ids(
                run, workdir, "give the path of the tokenizer they were made with"
            )
        return None
    own = data.load_tokenizer(folder.tokenizer)
    same = (now.tokenizer, now.end_of_text) == (then.tokenizer, then.end_of_text)
    if now.source == "synthetic" or same:
        return own
    named = data.read_tokenizer(now)
    if named and own.vocabulary().items() <= named.vocabulary().items():
        return named
    raise _other_ids(run, workdir, f"set it back to {then.tokenizer!r}")


def _other_ids(run: RunConfig, workdir: str, remedy: str) -> ConfigError:
    return ConfigError(
        [
            f"data.tokenizer={run.data.tokenizer!r}; its ids would not be those that "
            f"the checkpoints in {workdir} know; {remedy}."
        ]
    )
