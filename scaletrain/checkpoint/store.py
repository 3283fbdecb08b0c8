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

    One save runs at a time, and all processes learn its result at the same step.

    Args:
      workdir: the folder of the run.
      run: its settings, which every checkpoint stores.
      say: shows a line to the user.
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
        self._after: list[int] = []  # the steps that exist once the running save ends
        self._failures = 0  # failed saves in a row

    def remove(self, step: int) -> None:
        """Removes a step, in all processes."""
        if cluster.lead():
            writer.remove(self.folder, step)
        cluster.wait("removal")
        self._steps.remove(step)

    def newest_undamaged(self) -> int | None:
        """Returns the newest complete step whose files match its manifest.

        With checkpoint.on_damage=previous damaged steps are set aside, with a message.

        Raises:
          CheckpointError: the newest step is damaged, or every step is.
        """
        any_damaged = False
        while (step := self.latest()) is not None:
            problem = self._damage(step)
            if problem is None:
                return step
            if self.run.checkpoint.on_damage == "stop":
                raise problem
            any_damaged = True
            self._say(f"{problem}")
            self._set_aside(step)
        if any_damaged:
            raise CheckpointError(
                f"{self.folder}; every checkpoint is damaged, and they are set aside; "
                "put one back, or train in an empty workdir."
            )
        return None

    def _set_aside(self, step: int) -> None:
        """Renames a damaged step, so that no run uses it and no byte of it is lost."""
        if cluster.lead():
            names = (f"{step}.damaged{n}" for n in ("", *range(2, 1000)))
            free = next(n for n in names if not (self.folder / n).exists())
            (self.folder / str(step)).rename(self.folder / free)
        cluster.wait("set aside")
        self._steps.remove(step)

    @contextlib.contextmanager
    def reserved(self, state: TrainState) -> Iterator[Callable[[], Any]]:
        """Yields a function that waits until host memory for saves is allocated.

        A thread allocates it during the `with` block. Otherwise the first save would,
        and the devices would wait. They do not answer during an allocation, so a caller
        that needs an answer calls the function first.
        """
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            reservation = pool.submit(writer.reserve, items(state))
            yield functools.partial(concurrent.futures.wait, [reservation])
            try:
                reservation.result()
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
        """Starts saving a step; returns when the arrays are copied off the device.

        A failure of this save or of the one before it is shown, and training goes on
        until more than `checkpoint.max_failed_saves` in a row have failed.

        Args:
          step: the number of optimizer steps taken; a step is saved only once.
          state: the state after it.
          data_fingerprint: of the corpus, see `data.Corpus`.
          rollbacks: the rollbacks so far, see `rollbacks.Rollbacks.brief`.
          needed: whether the run cannot go on without this save; then it is complete
            when this method returns.

        Raises:
          CheckpointError: too many saves failed, or a needed one did.
        """
        self._end_save()
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
        """Saves weights by path as step 0, in the dtypes they have, and waits.

        Raises:
          CheckpointError: the weights could not be saved.
        """
        # Small chunks in small files: encoded chunks stay in memory until their file is
        # on disk, and a machine may have just enough memory for the weights.
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
        save_options: Mapping[str, Any] = types.MappingProxyType({}),
    ) -> None:
        """Starts writing a step.

        Args:
          step: its number.
          data: the position in the data, None for an import.
          items: the arrays by item and path.
          save_options: for `PyTreeSave` of each item.
        """
        leaves = {
            item: {
                path: {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}
                for path, leaf in tree.items()
            }
            for item, tree in items.items()
        }
        content = Manifest(json.loads(config.to_json(self.run)), data, leaves)
        args = {
            item: ocp.args.PyTreeSave(tree, **save_options)
            for item, tree in items.items()
        }
        after = retention.retained_steps(self.run, [*self._steps, step])
        superfluous = [old for old in self._steps if old not in after]
        self._writer.begin(step, content, args, superfluous)
        self._after = after

    def _wait(self) -> None:
        """Waits for the running save; from then on its step exists."""
        after, self._after = self._after, []
        self._writer.wait()
        if after:
            self._steps, self._failures = after, 0

    def check(self, *, together: bool) -> None:
        """Ends the running save if all processes are done with it; raises like `save`.

        Args:
          together: whether several processes ask at this step. They wait for each
            other, so they ask only at some steps.
        """
        if not self._after or (jax.process_count() > 1 and not together):
            return
        ended = cluster.gather("ended", str(self._writer.ended()))
        if all(answer == str(True) for answer in ended):
            self._end_save()

    def _end_save(self) -> None:
        """Waits for the running save; shows its failure, or raises it if too many."""
        try:
            self._wait()
        except FAILURES as err:
            self._fail(err)

    def _fail(self, err: Exception) -> None:
        """Shows the failure of a save, or raises it after too many in a row."""
        self._failures += 1
        problem, most = self._unsaved(err), self.run.checkpoint.max_failed_saves
        if self._failures > most:
            raise problem from err
        self._say(f"{problem} Training goes on ({self._failures} of {most} failures).")

    def finish(self) -> None:
        """Waits until every save is durable.

        Raises:
          CheckpointError: a save has failed.
        """
        try:
            self._wait()
        except FAILURES as err:
            raise self._unsaved(err) from err

    def close(self) -> None:
        """Ends the background threads."""
        self._writer.close()

    def _unsaved(self, err: Exception) -> CheckpointError:
        failure = CheckpointError(
            f"{self.folder}; a checkpoint could not be written ({writer.reason(err)}); "
            "see that the folder is there, writable and has room; newest whole step: "
            f"{self.latest()}."
        )
        failure.exit_code = 1  # a fault of the disk, not of the request
        return failure
