"""Checkpoints: parameters, optimizer state, step, key, data identity and settings.

One directory a step, written in the background under a temporary name and renamed when
whole, with a manifest of what it holds; what has no final name does not exist. Arrays
are stored under their paths, so a checkpoint does not depend on the classes that held
them, and are restored straight onto whatever mesh there is now.
"""

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import pathlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from scaletrain import cluster, config, manifest, retention, writer
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.manifest import Manifest
from scaletrain.step import TrainState
from scaletrain.writer import FAILURES, Writer

Tree = Any
_REST = ("step", "key", "opt_state", "amax")  # of a state, beside its parameters
_CHUNK_BYTES = 2**24  # of an import's arrays


def flat(tree: Tree) -> dict[str, Any]:
    """Returns the leaves of `tree` by path, such as blocks/mlp/up/weight."""
    leaves = jax.tree.flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(p, simple=True, separator="/"): v for p, v in leaves}


def _items(state: TrainState) -> dict[str, dict[str, Any]]:
    """Returns what a checkpoint of a run holds, by item and path."""
    rest = {name: getattr(state, name) for name in _REST}
    return {"params": flat(state.params), "rest": flat(rest)}


def steps_in(workdir: pathlib.Path) -> list[int]:
    """Returns the whole steps of a workdir, in order."""
    names = [path.name for path in (pathlib.Path(workdir) / "checkpoints").glob("*")]
    return sorted(int(name) for name in names if name.isdigit())


class Checkpoints:
    """The checkpoints of one workdir.

    One save runs at a time, and all processes learn at the same step what came of it.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        run: RunConfig,
        *,
        read_only: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        self.run, self._say = run, say
        self._writer = Writer(self.folder)
        # A reader must not clear away what a trainer is writing.
        if not read_only:
            self._writer.prepare()
        self._steps = steps_in(workdir)
        self._after: list[int] = []  # the steps there are once the save that runs is
        self._failures = 0  # of saves, in a row

    def latest(self) -> int | None:
        """Returns the newest whole step, None when there is none."""
        return max(self._steps, default=None)

    def steps(self) -> list[int]:
        """Returns every whole step, in order."""
        return list(self._steps)

    def remove(self, step: int) -> None:
        """Removes a step, which has no name while it is half removed."""
        if cluster.lead():
            writer.remove(self.folder, step)
        cluster.wait("removal")
        self._steps.remove(step)

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
        """Raises CheckpointError if `step` is not there, or not as it was written."""
        self._folder_of(step)
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
        return _damaged(folder, found) if found else None

    def _set_aside(self, step: int) -> None:
        """Gives a step a name that is no step's; nothing of it is lost."""
        if cluster.lead():
            names = (f"{step}.damaged{n}" for n in ("", *range(2, 1000)))
            free = next(n for n in names if not (self.folder / n).exists())
            (self.folder / str(step)).rename(self.folder / free)
        cluster.wait("set aside")
        self._steps.remove(step)

    @contextlib.contextmanager
    def reserved(self, state: TrainState) -> Iterator[Callable[[], Any]]:
        """Takes the host memory that saves of `state` need, during the `with` block.

        The first of them would take it else, and keep the devices waiting. What it
        yields waits until it is taken, for whoever needs the devices to answer.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            taken = pool.submit(writer.reserve, _items(state))
            yield functools.partial(concurrent.futures.wait, [taken])
            try:
                taken.result()
            except (*FAILURES, MemoryError) as err:
                self._say(
                    "the host's memory for a copy of what a checkpoint holds could not "
                    f"be taken ({writer.reason(err)}); free some of it, or use a host "
                    "with more: saves will fail until then."
                )

    def save(
        self,
        step: int,
        state: TrainState,
        data_fingerprint: str,
        rollbacks: Sequence[Mapping[str, int]],
        *,
        needed: bool = False,
    ) -> None:
        """Starts saving a step, once; returns when the arrays are off the device.

        A save that fails is told of, and so is one that failed since; training goes on
        until `checkpoint.max_failed_saves` in a row have.

        Args:
          needed: whether the run cannot go on without it; then it ends before this
            returns.

        Raises:
          CheckpointError: too many saves failed, or one that is needed.
        """
        self._settle()
        if step in self._steps:
            return
        data = {
            "fingerprint": data_fingerprint,
            "next_step": step,
            "rollbacks": list(rollbacks),
        }
        try:
            self._begin(step, data, _items(state))
            if needed:
                self._wait()
        except FAILURES as err:
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
            self._begin(0, None, {"params": dict(weights)}, small)
        except FAILURES as err:
            raise self._unsaved(err) from err
        self.finish()

    def _begin(
        self,
        step: int,
        data: dict[str, Any] | None,
        items: Mapping[str, dict[str, Any]],
        how: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        leaves = {
            item: {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
                for path, leaf in tree.items()
            }
            for item, tree in items.items()
        }
        whole = Manifest(json.loads(config.to_json(self.run)), data, leaves)
        args = {item: ocp.args.PyTreeSave(tree, **how) for item, tree in items.items()}
        after = retention.kept(self.run, [*self._steps, step])
        gone = [old for old in self._steps if old not in after]
        self._writer.begin(step, whole, args, gone)
        self._after = after

    def _wait(self) -> None:
        """Waits for the save that runs; from then on its step counts."""
        after, self._after = self._after, []
        self._writer.wait()
        if after:
            self._steps, self._failures = after, 0

    def check(self, *, together: bool) -> None:
        """Tells of a save that has failed since; raises what `save` does.

        Args:
          together: whether this is one of the steps at which several processes ask.
            They wait for each other then, so not at all of them.
        """
        if not self._after or (jax.process_count() > 1 and not together):
            return
        ended = cluster.gather("ended", str(self._writer.ended()))
        if all(each == str(True) for each in ended):
            self._settle()

    def _settle(self) -> None:
        try:
            self._wait()
        except FAILURES as err:
            self._fail(err)

    def _fail(self, err: Exception) -> None:
        """Goes on without a save that failed, unless too many have."""
        self._failures += 1
        problem, most = self._unsaved(err), self.run.checkpoint.max_failed_saves
        if self._failures > most:
            raise problem from err
        self._say(f"{problem} Training goes on ({self._failures} of {most} failures).")

    def finish(self) -> None:
        """Waits until every save is durable.

        Raises:
          CheckpointError: one has failed.
        """
        try:
            self._wait()
        except FAILURES as err:
            raise self._unsaved(err) from err

    def close(self) -> None:
        """Lets go of the background threads."""
        self._writer.close()

    def _unsaved(self, err: Exception) -> CheckpointError:
        failure = CheckpointError(
            f"{self.folder}; a checkpoint could not be written ({writer.reason(err)}); "
            "see that the folder is there, writable and has room; newest whole step: "
            f"{self.latest()}."
        )
        failure.exit_code = 1
        return failure

    def data(self, step: int) -> Mapping[str, Any] | None:
        """Returns where the data stood at `step`, None for an import.

        Raises:
          CheckpointError: there is no such step, or it is damaged.
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
            have = ", ".join(map(str, self._steps)) or "none"
            raise CheckpointError(
                f"--step={step}; {self.folder} has no such checkpoint; it has {have}."
            )
        return self.folder / str(step)

    def is_import(self, step: int) -> bool:
        """Returns whether `step` holds weights alone, brought from elsewhere."""
        return self.data(step) is None

    def agree(self, step: int, state: TrainState, data_fingerprint: str) -> list[str]:
        """Returns the harmless differences between the settings of `step` and now.

        Args:
          state: shapes of what `step` is to be restored as.

        Raises:
          CheckpointError: a difference that changes the model or the data.
        """
        data = self.data(step)
        held, free = config.differences(self.settings(step), self.run)
        if data is None:  # an import has seen no data and has no optimizer
            held = [line for line in held if line.startswith(("model.", "lora."))]
            free = []
        elif data["fingerprint"] != data_fingerprint:
            held += [line for line in free if line.startswith("data.")]
            held.append("data: the corpus or its tokenizer is not the one of then")
        if held:
            lines = "\n".join(f"  {line}" for line in held)
            raise CheckpointError(
                f"{self.folder / str(step)} was made with other settings:\n{lines}\n"
                "set them back, or train in an empty workdir."
            )
        for item, wanted in _items(state).items():
            if item == "params" or data is not None:
                self._compare(step, item, wanted)
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
        args = ocp.args.PyTreeRestore(wanted, restore_args=layout)
        reader = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
        try:
            with contextlib.closing(reader):
                found = reader.restore(self.folder / str(step) / item, args=args)
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
        leaves = self._manifest(step).leaves.get(item, {})
        return {
            path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"])
            for path, leaf in leaves.items()
        }


def _damaged(folder: pathlib.Path, found: Sequence[str]) -> CheckpointError:
    listed = "\n".join(f"  {line}" for line in found[:20])
    return CheckpointError(
        f"{folder} is damaged:\n{listed}\nput these files back, or go on from the step "
        "before it with checkpoint.on_damage=previous."
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
        checkpoints.verify(step)
        yield checkpoints, step
