"""The checkpoints of a workdir, read only: verified, compared, restored."""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaletrain import config
from scaletrain.checkpoint import manifest
from scaletrain.checkpoint.manifest import Manifest
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.program import TrainState
from scaletrain.workdir import Workdir

Tree = Any
REST = ("step", "key", "opt_state", "amax")  # fields of a state besides its parameters


def flat(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of `tree` by path, such as blocks/mlp/up/weight."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns the arrays that a checkpoint of a run holds, by item and path."""
    rest = {name: getattr(state, name) for name in REST}
    return {"params": flat(state.params), "rest": flat(rest)}


class Reader:
    """The checkpoints of one workdir, read only: it makes, moves and removes no file.

    Args:
      workdir: the folder with the checkpoints.
      run: the settings to restore them under.
    """

    def __init__(self, workdir: Workdir, run: RunConfig):
        self.folder = workdir.checkpoints.absolute()
        self.run = run
        self._steps = workdir.steps()

    def latest(self) -> int | None:
        """Returns the newest complete step, None when there is none."""
        return max(self._steps, default=None)

    def steps(self) -> list[int]:
        """Returns the complete steps, in order."""
        return list(self._steps)

    def verify(self, step: int) -> None:
        """Raises CheckpointError if `step` is missing or damaged."""
        self._folder_of(step)
        if (problem := self._damage(step)) is not None:
            raise problem

    def _damage(self, step: int) -> CheckpointError | None:
        """Returns the error of a damaged step, in all processes; None if intact."""
        folder = self.folder / str(step)
        # Each process reads a share of the files, so that large steps verify quickly.
        damages = manifest.damage(folder, jax.process_index(), jax.process_count())
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.int32(len(damages)))
            if not damages and np.any(counts):
                damages = [f"process {int(np.argmax(counts))} tells what is wrong"]
        return _damaged(folder, damages) if damages else None

    def data(self, step: int) -> Mapping[str, Any] | None:
        """Returns the position in the data at `step`, None for an import.

        Raises:
          CheckpointError: the step does not exist, or it is damaged.
        """
        return self._manifest(step).data

    def settings(self, step: int) -> RunConfig:
        """Returns the settings stored with `step`."""
        return config.from_json(json.dumps(self._manifest(step).config))

    def _manifest(self, step: int) -> Manifest:
        folder = self._folder_of(step)
        try:
            return Manifest.read(folder)
        except (OSError, ValueError, TypeError) as err:
            raise _damaged(folder, [f"{manifest.NAME}: {err}"]) from err

    def _folder_of(self, step: int) -> pathlib.Path:
        if step not in self._steps:
            steps = ", ".join(map(str, self._steps)) or "none"
            raise CheckpointError(
                f"--step={step}; {self.folder} has no such checkpoint; it has {steps}."
            )
        return self.folder / str(step)

    def is_import(self, step: int) -> bool:
        """Returns whether `step` holds only imported weights."""
        return self.data(step) is None

    def agree(self, step: int, state: TrainState, data_fingerprint: str) -> list[str]:
        """Returns the harmless differences between the settings of `step` and `run`.

        Args:
          step: the step to go on from.
          state: the shapes to restore it as.
          data_fingerprint: of the present corpus, see `data.Corpus`.

        Raises:
          CheckpointError: a difference that changes the model or the data.
        """
        data = self.data(step)
        forbidden, allowed = config.differences(self.settings(step), self.run)
        if data is None:  # an import has seen no data and has no optimizer
            forbidden = [
                line for line in forbidden if line.startswith(("model.", "lora."))
            ]
            allowed = []
        elif data["fingerprint"] != data_fingerprint:
            forbidden += [line for line in allowed if line.startswith("data.")]
            forbidden.append("data: the corpus or its tokenizer is not the one of then")
        if forbidden:
            lines = "\n".join(f"  {line}" for line in forbidden)
            raise CheckpointError(
                f"{self.folder / str(step)} was made with other settings:\n{lines}\n"
                "set them back, or train in an empty workdir."
            )
        for item, leaves in items(state).items():
            if item == "params" or data is not None:
                self._compare(step, item, leaves)
        return allowed

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Returns the state of `step`, sharded like `state`.

        Frozen weights are not in a run's checkpoints: those of `state` stay.

        Raises:
          CheckpointError: a leaf is missing, unknown or of another shape.
        """
        params = self.restore_params(step, state.params)
        rest = {name: getattr(state, name) for name in REST}
        rest = self._restore(step, "rest", rest)
        return dataclasses.replace(state, params=params, **rest)

    def restore_params(self, step: int, params: Tree) -> Tree:
        """Returns the parameters of `step`, sharded like `params`."""
        return self._restore(step, "params", params)

    def dtypes(self, step: int) -> dict[str, np.dtype]:
        """Returns the stored dtype of each parameter of `step`, by path."""
        stored = self._stored(step, "params")
        return {name: np.dtype(leaf.dtype) for name, leaf in stored.items()}

    def _restore(self, step: int, item: str, tree: Tree) -> Tree:
        shapes = flat(tree)
        self._compare(step, item, shapes)
        layout = ocp.checkpoint_utils.construct_restore_args(shapes)
        args = ocp.args.PyTreeRestore(shapes, restore_args=layout)
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            with contextlib.closing(reader):
                leaves = reader.restore(self.folder / str(step) / item, args=args)
        except (OSError, ValueError) as err:
            reason = str(err).strip().splitlines()[0]
            raise CheckpointError(
                f"{self.folder / str(step)}; could not be read ({reason}); "
                "remove that folder to go on from the step before it."
            ) from err
        return jax.tree.unflatten(jax.tree.structure(tree), [leaves[k] for k in shapes])

    def _compare(self, step: int, item: str, leaves: Mapping[str, Any]) -> None:
        """Raises CheckpointError where names or shapes of leaves differ on disk."""
        stored = self._stored(step, item)
        lines = [f"{name}: missing" for name in leaves if name not in stored]
        lines += [f"{name}: not in this model" for name in stored if name not in leaves]
        lines += [
            f"{name}: {tuple(stored[name].shape)} stored, {leaf.shape} wanted"
            for name, leaf in leaves.items()
            if name in stored and tuple(stored[name].shape) != leaf.shape
        ]
        if lines:
            listed = "\n".join(f"  {line}" for line in lines[:20])
            raise CheckpointError(
                f"{self.folder / str(step)} does not hold this {item}:\n{listed}\n"
                "use the settings it was made with."
            )

    def _stored(self, step: int, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shapes and dtypes of the stored leaves of `item`, by path."""
        leaves = self._manifest(step).leaves.get(item, {})
        return {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
            for path, leaf in leaves.items()
        }


def _damaged(folder: pathlib.Path, damages: Sequence[str]) -> CheckpointError:
    listed = "\n".join(f"  {line}" for line in damages[:20])
    return CheckpointError(
        f"{folder} is damaged:\n{listed}\nput these files back, or go on from the step "
        "before it with checkpoint.on_damage=previous."
    )


def reading(workdir: str, run: RunConfig, step: int | None) -> tuple[Reader, int]:
    """Returns the checkpoints of a workdir and a verified step.

    Args:
      workdir: the folder of a run or an import.
      run: the settings to restore under.
      step: the step to verify; None for the newest.

    Raises:
      CheckpointError: the workdir holds no such checkpoint.
    """
    folder = Workdir.of(workdir)
    missing = f"--workdir={workdir}; no whole checkpoint there; train first."
    if not folder.checkpoints.is_dir():
        raise CheckpointError(missing)
    checkpoints = Reader(folder, run)
    step = checkpoints.latest() if step is None else step
    if step is None:
        raise CheckpointError(missing)
    checkpoints.verify(step)
    return checkpoints, step
