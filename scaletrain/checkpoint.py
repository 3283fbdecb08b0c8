"""Checkpoints: parameters, optimizer state, step, key, data identity and settings.

One directory a step, written in the background by Orbax under a temporary name and
renamed when whole; what has no final name does not exist. Arrays are stored under
their paths, so a checkpoint does not depend on the classes that held them, and are
restored straight onto whatever mesh there is now.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from scaletrain import cluster, config
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.step import TrainState

Tree = Any
_CHUNK_BYTES = 2**24  # of an import's arrays


def flat(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of `tree` by path, such as blocks/mlp/up/weight."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self, workdir: pathlib.Path, run: RunConfig, *, read_only: bool = False
    ):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.run = run
        keeps = [policy.LatestN(run.checkpoint.keep), policy.CustomSteps([0])]
        if every := run.checkpoint.keep_every_steps:
            keeps.append(policy.EveryNSteps(every))
        options = ocp.CheckpointManagerOptions(
            # Step 0 is an import: other runs may adapt it.
            preservation_policy=policy.AnyPreservationPolicy(keeps),
            enable_async_checkpointing=True,
            # A reader must not clear away what a trainer is writing.
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(),
                "rest": ocp.PyTreeCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
        )

    def latest(self) -> int | None:
        """Returns the newest whole step, None when there is none."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Returns every whole step, in order."""
        return sorted(self._manager.all_steps())

    def remove(self, step: int) -> None:
        """Removes a step, which has no name while it is half removed."""
        if cluster.lead():
            nameless = self.folder / f"{step}.orbax-checkpoint-tmp"
            (self.folder / str(step)).rename(nameless)
            shutil.rmtree(nameless)
        cluster.wait("removal")
        self._manager.reload()

    def save(
        self,
        step: int,
        state: TrainState,
        data_fingerprint: str,
        rollbacks: Sequence[Mapping[str, int]],
    ) -> None:
        """Starts saving; returns once the arrays are off the device.

        Raises:
          CheckpointError: this save could not start, or the one before it failed.
        """
        self.check()
        rest = {"step": state.step, "key": state.key, "opt_state": state.opt_state}
        self._save(
            step,
            {
                "fingerprint": data_fingerprint,
                "next_step": step,
                "rollbacks": list(rollbacks),
            },
            params=ocp.args.PyTreeSave(flat(state.params)),
            rest=ocp.args.PyTreeSave(flat(rest)),
        )

    def save_weights(self, weights: Mapping[str, Any]) -> None:
        """Saves weights by path as step 0, in the formats they have, and waits.

        Raises:
          CheckpointError: they could not be saved.
        """
        # Small chunks in small files: what is encoded and not yet on disk is memory
        # that a machine just large enough for the weights does not have.
        chunks = dict.fromkeys(weights, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
        params = ocp.args.PyTreeSave(
            dict(weights), chunks, ocdbt_target_data_file_size=4 * _CHUNK_BYTES
        )
        self._save(0, None, params=params)
        self.finish()

    def _save(self, step: int, data: Mapping[str, Any] | None, **items: Any) -> None:
        about = {"config": json.loads(config.to_json(self.run)), "data": data}
        items["about"] = ocp.args.JsonSave(about)
        try:
            self._manager.save(step, args=ocp.args.Composite(**items))
        except (OSError, ValueError) as err:
            raise self._unsaved(err) from err

    def check(self) -> None:
        """Raises CheckpointError if a save in the background has failed."""
        try:
            self._manager.check_for_errors()
        except (OSError, ValueError, RuntimeError) as err:
            raise self._unsaved(err) from err

    def finish(self) -> None:
        """Waits until every save is durable; raises what `check` raises."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError, RuntimeError) as err:
            raise self._unsaved(err) from err

    def close(self) -> None:
        """Lets go of the background threads."""
        self._manager.close()

    def _unsaved(self, err: Exception) -> CheckpointError:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else repr(err)
        failure = CheckpointError(
            f"{self.folder}; a checkpoint could not be written ({reason}); "
            f"make room, then start again; newest whole step: {self.latest()}."
        )
        failure.exit_code = 1
        return failure

    def about(self, step: int) -> Mapping[str, Any]:
        """Returns the settings and the data identity stored with `step`.

        Raises:
          CheckpointError: there is no such step.
        """
        if step not in self._manager.all_steps():
            have = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise CheckpointError(
                f"--step={step}; {self.folder} has no such checkpoint; it has {have}."
            )
        args = ocp.args.Composite(about=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["about"]

    def settings(self, step: int) -> RunConfig:
        """Returns the settings stored with `step`."""
        return config.from_json(json.dumps(self.about(step)["config"]))

    def is_import(self, step: int) -> bool:
        """Returns whether `step` holds weights alone, brought from elsewhere."""
        return self.about(step)["data"] is None

    def agree(self, step: int, data_fingerprint: str) -> list[str]:
        """Returns the harmless differences between the settings of `step` and now.

        Raises:
          CheckpointError: a difference that changes the model or the data.
        """
        data = self.about(step)["data"]
        held, free = config.differences(self.settings(step), self.run)
        if data is None:  # an import has seen no data and has no optimizer
            held = [line for line in held if line.startswith(("model.", "lora."))]
            free = []
        elif data["fingerprint"] != data_fingerprint:
            held.append("data: the corpus or its tokenizer is not the one of then")
        if held:
            lines = "\n".join(f"  {line}" for line in held)
            raise CheckpointError(
                f"{self.folder / str(step)} was made with other settings:\n{lines}\n"
                "set them back, or train in an empty workdir."
            )
        return free

    def restore(self, step: int, state: TrainState) -> TrainState:
        """Returns `state` with what `step` holds, laid out like it is.

        What is frozen is not in a run's checkpoints and stays as it is given.

        Raises:
          CheckpointError: a leaf is missing, unknown or of another shape.
        """
        params = self.restore_params(step, state.params)
        rest = {"step": state.step, "key": state.key, "opt_state": state.opt_state}
        rest = self._restore(step, "rest", rest)
        return dataclasses.replace(state, params=params, **rest)

    def restore_params(self, step: int, params: Tree) -> Tree:
        """Returns the parameters of `step` alone, laid out like `params`."""
        return self._restore(step, "params", params)

    def dtypes(self, step: int) -> dict[str, np.dtype]:
        """Returns the format each parameter of `step` is stored in, by path."""
        stored = self._stored(step, "params")
        return {name: np.dtype(leaf.dtype) for name, leaf in stored.items()}

    def _restore(self, step: int, item: str, tree: Tree) -> Tree:
        wanted = flat(tree)
        self._compare(step, item, wanted)
        layout = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.Composite(
            **{item: ocp.args.PyTreeRestore(wanted, restore_args=layout)}
        )
        try:
            found = self._manager.restore(step, args=args)[item]
        except (OSError, ValueError) as err:
            reason = str(err).strip().splitlines()[0]
            raise CheckpointError(
                f"{self.folder / str(step)}; could not be read ({reason}); "
                "remove that folder to go on from the step before it."
            ) from err
        return jax.tree.unflatten(jax.tree.structure(tree), [found[k] for k in wanted])

    def _compare(self, step: int, item: str, wanted: Mapping[str, Any]) -> None:
        stored = self._stored(step, item)
        lines = [f"{name}: missing" for name in wanted if name not in stored]
        lines += [f"{name}: not in this model" for name in stored if name not in wanted]
        lines += [
            f"{name}: {tuple(stored[name].shape)} stored, {leaf.shape} wanted"
            for name, leaf in wanted.items()
            if name in stored and tuple(stored[name].shape) != leaf.shape
        ]
        if lines:
            listed = "\n".join(f"  {line}" for line in lines[:20])
            raise CheckpointError(
                f"{self.folder / str(step)} does not hold this {item}:\n{listed}\n"
                "use the settings it was made with."
            )

    def _stored(self, step: int, item: str) -> dict[str, Any]:
        """Returns shape and format of what `item` of `step` holds, by path."""
        stored = self._manager.item_metadata(step)[item]
        if stored is None:
            raise CheckpointError(
                f"{self.folder / str(step)}; {item} is missing; "
                "remove that folder to go on from the step before it."
            )
        return dict(stored.tree if hasattr(stored, "tree") else stored)


def prepare_workdir(workdir: str) -> pathlib.Path:
    """Returns the workdir, made if missing.

    Raises:
      CheckpointError: it cannot be made or written.
    """
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(
            f"--workdir={workdir}; {err.strerror}; give a folder that can be made."
        ) from err
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"--workdir={workdir}; not writable; give a folder you may write to."
        )
    return path


def check_room(setting: str, folder: pathlib.Path, nbytes: int) -> None:
    """Refuses to begin what would fill the disk that `folder` is or will be on.

    Raises:
      CheckpointError: it has less than `nbytes`; `setting` is what the user gave.
    """
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise CheckpointError(
            f"{setting}; {nbytes:,} bytes are to be written there and {free:,} are "
            "free; make room, or give a folder on another disk."
        )


@contextlib.contextmanager
def reading(
    workdir: str, run: RunConfig, step: int | None
) -> Iterator[tuple[Checkpoints, int]]:
    """Yields the checkpoints of a workdir and the step that is meant (None: newest).

    Raises:
      CheckpointError: the workdir holds no such checkpoint.
    """
    path = pathlib.Path(workdir)
    missing = f"--workdir={workdir}; no whole checkpoint there; train first."
    if not (path / "checkpoints").is_dir():
        raise CheckpointError(missing)
    with contextlib.closing(Checkpoints(path, run, read_only=True)) as checkpoints:
        step = checkpoints.latest() if step is None else step
        if step is None:
            raise CheckpointError(missing)
        checkpoints.about(step)
        yield checkpoints, step


def weights_of(
    workdir: str, run: RunConfig, step: int | None, state: TrainState
) -> tuple[int, Tree]:
    """Returns a step (default: the newest) and its weights laid out like `state`.

    Raises:
      CheckpointError: the workdir holds no such checkpoint, or one of another model.
    """
    with reading(workdir, run, step) as (checkpoints, step):
        params = checkpoints.restore_params(step, state.params)
        begun_from = checkpoints.settings(step).init_from
    run = dataclasses.replace(run, init_from=begun_from)
    frozen = initial_weights(run, state.frozen) if state.frozen else {}
    return step, dataclasses.replace(state, params=params, frozen=frozen).weights


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
    workdir, step = origin(run.init_from)
    if not (pathlib.Path(workdir) / "checkpoints").is_dir():
        raise CheckpointError(
            f"init_from={run.init_from}; no checkpoint there; "
            "give the workdir of an import or of a run."
        )
    try:
        with reading(workdir, run, step) as found:
            yield found
    except CheckpointError as err:
        raise CheckpointError(f"init_from={run.init_from}; {err}") from err


def origin(init_from: str) -> tuple[str, int | None]:
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
    workdir = os.path.abspath(origin(run.init_from)[0])
    return dataclasses.replace(run, init_from=f"{workdir}@{step}")
