"""Checkpoints: parameters, optimizer state, step, key, data identity and settings.

One directory a step, written in the background by Orbax under a temporary name and
renamed when whole, with a manifest of what it holds; what has no final name does not
exist. Arrays are stored under their paths, so a checkpoint does not depend on the
classes that held them, and are restored straight onto whatever mesh there is now.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaletrain import cluster, config, manifest
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.manifest import Manifest
from scaletrain.retention import Retention
from scaletrain.step import TrainState

Tree = Any
_REST = ("step", "key", "opt_state", "amax")  # of a state, beside its parameters
_CHUNK_BYTES = 2**24  # of an import's arrays
_FAILURES = (OSError, ValueError, RuntimeError)  # of a save


def flat(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of `tree` by path, such as blocks/mlp/up/weight."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(
        self,
        workdir: pathlib.Path,
        run: RunConfig,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.run, self._say, self._read_only = run, say, read_only
        # The newest step there was, and the saves that have failed since.
        self._failed: tuple[int | None, int] = (None, 0)
        self._saving: tuple[int, dict[str, Any]] | None = None  # step, leaves
        self._manager = self._opened()

    def _opened(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Retention(self.run),
            enable_async_checkpointing=True,
            # Called when all is written and the folder has no name yet.
            # Folders are made while the loop waits: a disk that refuses them says so at
            # once, and leaves no threads that wait for them when the process ends.
            async_options=ocp.options.AsyncOptions(
                post_finalization_callback=self._complete,
                create_directories_asynchronously=False,
            ),
            # A reader must not clear away what a trainer is writing.
            cleanup_tmp_directories=not self._read_only,
            read_only=self._read_only,
        )
        return ocp.CheckpointManager(
            self.folder,
            options=options,
            item_handlers={
                "params": ocp.PyTreeCheckpointHandler(),
                "rest": ocp.PyTreeCheckpointHandler(),
                "about": ocp.JsonCheckpointHandler(),
            },
        )

    def _complete(self) -> None:
        """Writes the manifest of the step that is being saved."""
        assert self._saving is not None
        step, leaves = self._saving
        (folder,) = self.folder.glob(f"{step}.orbax-checkpoint-tmp*")
        settings = hashlib.sha256(config.to_json(self.run).encode()).hexdigest()
        Manifest.of(folder, settings, leaves).write(folder)

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

    def sound(self) -> int | None:
        """Returns the newest whole step, its files compared with its manifest.

        With checkpoint.on_damage=previous a damaged one is set aside, loudly.

        Raises:
          CheckpointError: it is damaged, or every one is.
        """
        damaged = False
        while (step := self.latest()) is not None:
            problem = self._damage(step)
            if problem is None:
                return step
            if self.run.checkpoint.on_damage == "stop":
                raise problem
            damaged = True
            self._say(f"{problem}")
            self._set_aside(step)
        if damaged:
            raise CheckpointError(
                f"{self.folder}; every checkpoint is damaged, and they are set aside; "
                "put one back, or train in an empty workdir."
            )
        return None

    def verify(self, step: int) -> None:
        """Raises CheckpointError if `step` is not as it was written."""
        if (problem := self._damage(step)) is not None:
            raise problem

    def _damage(self, step: int) -> CheckpointError | None:
        """Returns what is wrong with a step; each process reads a part of it."""
        folder = self.folder / str(step)
        found = manifest.damage(folder, jax.process_index(), jax.process_count())
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.int32(len(found)))
            if not found and np.any(counts):
                found = [f"process {int(np.argmax(counts))} tells what is wrong"]
        if not found:
            return None
        listed = "\n".join(f"  {line}" for line in found[:20])
        return CheckpointError(
            f"{folder} is damaged:\n{listed}\nput these files back, or go on from the "
            "step before it with checkpoint.on_damage=previous."
        )

    def _set_aside(self, step: int) -> None:
        """Gives a step a name that is no step's; nothing of it is lost."""
        if cluster.lead():
            (self.folder / str(step)).rename(self.folder / f"{step}.damaged")
        cluster.wait("set aside")
        self._manager.reload()

    def save(
        self,
        step: int,
        state: TrainState,
        data_fingerprint: str,
        rollbacks: Sequence[Mapping[str, int]],
        *,
        needed: bool = False,
    ) -> None:
        """Starts saving; returns once the arrays are off the device.

        A save that fails is told of, and so is one that failed since; training goes on
        until `checkpoint.max_failed_saves` in a row have.

        Args:
          needed: whether the run cannot go on without it; then it ends before this
            returns.

        Raises:
          CheckpointError: too many saves failed, or one that is needed.
        """
        rest = {name: getattr(state, name) for name in _REST}
        data = {
            "fingerprint": data_fingerprint,
            "next_step": step,
            "rollbacks": list(rollbacks),
        }
        try:
            self._manager.wait_until_finished()
        except _FAILURES as err:
            self._fail(err)
        try:
            self._save(step, data, params=flat(state.params), rest=flat(rest))
            if needed:
                self._manager.wait_until_finished()
        except _FAILURES as err:
            if needed:
                raise self._unsaved(err) from err
            self._fail(err)

    def save_weights(self, weights: Mapping[str, Any]) -> None:
        """Saves weights by path as step 0, in the formats they have, and waits.

        Raises:
          CheckpointError: they could not be saved.
        """
        # Small chunks in small files: what is encoded and not yet on disk is memory
        # that a machine just large enough for the weights does not have.
        chunks = dict.fromkeys(weights, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
        small = {
            "save_args": chunks,
            "ocdbt_target_data_file_size": 4 * _CHUNK_BYTES,
        }
        try:
            self._save(0, None, small, params=dict(weights))
        except _FAILURES as err:
            raise self._unsaved(err) from err
        self.finish()

    def _save(
        self,
        step: int,
        data: Mapping[str, Any] | None,
        how: Mapping[str, Any] = types.MappingProxyType({}),
        **items: dict[str, Any],
    ) -> None:
        about = {"config": json.loads(config.to_json(self.run)), "data": data}
        self._saving = (
            step,
            {
                item: {
                    path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
                    for path, leaf in leaves.items()
                }
                for item, leaves in items.items()
            },
        )
        arguments: dict[str, Any] = {
            item: ocp.args.PyTreeSave(leaves, **how) for item, leaves in items.items()
        }
        arguments["about"] = ocp.args.JsonSave(about)
        self._manager.save(step, args=ocp.args.Composite(**arguments))

    def check(self) -> None:
        """Tells of a save that has failed since; raises what `save` does."""
        try:
            # Asking earlier would take the error from Orbax's thread, which would then
            # remove the steps that the failed one was to replace.
            if not self._manager.is_saving_in_progress():
                self._manager.wait_until_finished()
        except _FAILURES as err:
            self._fail(err)

    def _fail(self, err: Exception) -> None:
        """Goes on without a save that failed, unless too many have."""
        newest, most = self._on_disk(), self.run.checkpoint.max_failed_saves
        before, count = self._failed
        count = count + 1 if before == newest else 1
        self._failed = newest, count
        problem = self._unsaved(err)
        if count > most:
            raise problem from err
        self._say(f"{problem} Training goes on ({count} of {most} failures).")
        # The manager counts a step from the moment it begins to save it.
        with contextlib.suppress(*_FAILURES):
            self._manager.close()
        self._manager = self._opened()

    def finish(self) -> None:
        """Waits until every save is durable.

        Raises:
          CheckpointError: one has failed.
        """
        try:
            self._manager.wait_until_finished()
        except _FAILURES as err:
            raise self._unsaved(err) from err

    def close(self) -> None:
        """Lets go of the background threads."""
        self._manager.close()

    def _unsaved(self, err: Exception) -> CheckpointError:
        reason = str(err).strip().splitlines()[0] if str(err).strip() else repr(err)
        failure = CheckpointError(
            f"{self.folder}; a checkpoint could not be written ({reason}); "
            f"make room or mend it; newest whole step: {self._on_disk()}."
        )
        failure.exit_code = 1
        return failure

    def _on_disk(self) -> int | None:
        """Returns the newest step that has its name."""
        names = [path.name for path in self.folder.glob("*")]
        return max((int(name) for name in names if name.isdigit()), default=None)

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
        rest = {name: getattr(state, name) for name in _REST}
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

    def _stored(self, step: int, item: str) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns shape and format of what `item` of `step` holds, by path."""
        leaves = Manifest.read(self.folder / str(step)).leaves.get(item, {})
        return {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
            for path, leaf in leaves.items()
        }


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
        checkpoints.verify(step)
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
