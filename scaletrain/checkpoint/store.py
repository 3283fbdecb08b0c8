"""The checkpoints of a run: saved in the background, retained, set aside, removed."""

import concurrent.futures
import contextlib
import functools
import json
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from scaletrain import cluster, config
from scaletrain.checkpoint import retention, writer
from scaletrain.checkpoint.manifest import Manifest
from scaletrain.checkpoint.reader import Reader, items
from scaletrain.checkpoint.writer import FAILURES, Writer
from scaletrain.config import RunConfig
from scaletrain.errors import CheckpointError
from scaletrain.program import TrainState
from scaletrain.workdir import Workdir

_CHUNK_BYTES = 2**24  # of an import's arrays


class Store(Reader):
    """The checkpoints of one workdir, for the run that writes them.

    One save runs at a time, and all processes learn at the same step what came of it.
    """

    def __init__(
        self,
        workdir: Workdir,
        run: RunConfig,
        *,
        say: Callable[[str], None] = lambda line: None,
    ):
        self._say = say
        self._writer = Writer(workdir.checkpoints.absolute())
        self._writer.prepare()
        super().__init__(workdir, run)
        self._after: list[int] = []  # the steps there are once the save that runs is
        self._failures = 0  # of saves, in a row

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
            taken = pool.submit(writer.reserve, items(state))
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
            self._begin(step, data, items(state))
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
