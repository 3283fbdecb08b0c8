"""Steps on their way to the disk: whole or not at all, in all processes or in none.

Orbax writes one at a time in the background, under a name that says so, and renames it
when it is whole. What goes wrong in one process is raised in all of them: else the
others would wait at Orbax's barriers for one that has given up.
"""

import collections
import concurrent.futures
import contextlib
import functools
import os
import pathlib
import re
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import future

from scaletrain import cluster
from scaletrain.checkpoint import manifest
from scaletrain.checkpoint.manifest import UNFINISHED, Manifest
from scaletrain.errors import CheckpointError, LostError

FAILURES = (OSError, ValueError, RuntimeError)  # what Orbax and TensorStore raise
_PROBE_BYTES = 2**16


class Writer:
    """Writes steps into one folder."""

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._pool = concurrent.futures.ThreadPoolExecutor(1)
        self._running: concurrent.futures.Future[None] | None = None
        self._handler, self._orbax = _orbax()

    def prepare(self) -> None:
        """Makes the folder, and clears away what earlier attempts left half done.

        Raises:
          CheckpointError: it cannot be made.
        """
        if cluster.lead():
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
            except OSError as err:
                raise CheckpointError(
                    f"{self._folder}; {err.strerror}; see that its disk is there, or "
                    "give another workdir."
                ) from err
            self._sweep()

    def begin(
        self,
        step: int,
        whole: Manifest,
        items: Mapping[str, ocp.args.CheckpointArgs],
        superfluous: Iterable[int],
    ) -> None:
        """Starts writing a step; returns once its arrays are off the device.

        Args:
          whole: all of its manifest but the files.
          superfluous: the steps that go once it has its name.

        Raises:
          OSError, ValueError, RuntimeError: it cannot be written.
          CheckpointError: that showed in this process alone.
        """
        self._probe()
        self._sweep()  # again: writes outlive the error of one
        self._handler.whole = whole
        self._handler.device = self._folder.stat().st_dev
        try:
            self._orbax.save(self._folder / str(step), args=_Items(**items))
        except FAILURES as err:
            self._renew()
            if jax.process_count() > 1:
                raise _alone(self._folder, err) from err
            raise
        self._running = self._pool.submit(self._finish, list(superfluous))

    def _finish(self, superfluous: Iterable[int]) -> None:
        self._orbax.wait_until_finished()
        if cluster.lead():
            for step in superfluous:
                # One that stays goes after the next save.
                with contextlib.suppress(OSError):
                    remove(self._folder, step)

    def ended(self) -> bool:
        """Returns whether this process is done with the step that it began."""
        return self._running is not None and self._running.done()

    def wait(self) -> None:
        """Waits until the step that was begun is whole.

        Raises:
          OSError, ValueError, RuntimeError: it is not, for what went wrong in any
            process.
        """
        if self._running is None:
            return
        running, self._running = self._running, None
        try:
            _agree("commit", running.exception())
        except FAILURES:
            self._renew()
            raise

    def _probe(self) -> None:
        """Raises, in every process, what would keep any of them from writing."""
        probe, problem = self._folder / f"probe{jax.process_index()}", None
        try:
            probe.write_bytes(bytes(_PROBE_BYTES))
            probe.unlink()
        except OSError as err:
            problem = err
        _agree("probe", problem)

    def _sweep(self) -> None:
        """Removes what is half written or half removed: it takes room."""
        if cluster.lead():
            for path in self._folder.glob(f"[0-9]*{UNFINISHED}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _renew(self) -> None:
        """Begins with a new Orbax: the rests of a failed save would fail the next."""
        with contextlib.suppress(*FAILURES):
            self._orbax.close()
        self._handler, self._orbax = _orbax()
        self._sweep()

    def close(self) -> None:
        """Waits for what is being written; lets go of the background threads."""
        self._pool.shutdown()
        with contextlib.suppress(*FAILURES):
            self._orbax.close()


def reserve(tree: Any) -> None:
    """Takes the host memory that a save of sharded arrays or shapes copies them to.

    jax keeps it for the saves. Of a GPU's it is pinned, and no kernel starts while it
    is taken: 13 GB in 7.6 s on an H100's host (9.4 s array by array), where a copy then
    takes 0.3 s. Nothing of the kind is needed elsewhere.

    Raises:
      RuntimeError: there is not as much.
    """
    if jax.default_backend() == "gpu":
        jax.block_until_ready([_pinned(*part) for part in copied(tree).items()])


def copied(tree: Any) -> dict[Any, int]:
    """Returns devices of this process, and the bytes a save copies from each.

    Orbax divides what several devices hold among them.
    """
    sizes: dict[Any, int] = collections.defaultdict(int)
    for leaf in jax.tree.leaves(tree):
        for device in leaf.sharding.addressable_devices:
            whole = leaf.size * leaf.dtype.itemsize
            sizes[device] += -(-whole // leaf.sharding.num_devices)
    return sizes


def _pinned(device: Any, size: int) -> jax.Array:
    where = SingleDeviceSharding(device, memory_kind="pinned_host")
    return jax.device_put(np.empty(size, np.uint8), where)


def remove(folder: pathlib.Path, step: int) -> None:
    """Removes a step, which has no name while it is half removed."""
    nameless = folder / f"{step}{UNFINISHED}"
    (folder / str(step)).rename(nameless)
    shutil.rmtree(nameless)


def reason(err: BaseException) -> str:
    """Returns what the system said, out of a library's words around it."""
    if isinstance(err, OSError) and err.strerror:
        return err.strerror
    if found := re.search(r"os_error_code='(\d+)'", str(err)):
        return os.strerror(int(found[1]))
    return next(iter(str(err).strip().splitlines()), repr(err))


def _agree(moment: str, err: BaseException | None) -> None:
    """Raises, in every process, what went wrong in any of them."""
    told = cluster.gather(moment, reason(err) if err else "")
    if err:
        raise err
    for process, words in enumerate(told):
        if words:
            raise OSError(f"process {process}: {words}")


def _alone(folder: pathlib.Path, err: Exception) -> CheckpointError:
    """Returns what ends this process, since the others wait for it inside Orbax."""
    error = CheckpointError(
        f"{folder}; process {jax.process_index()} could not begin a checkpoint "
        f"({reason(err)}); start all of them again."
    )
    error.exit_code = LostError.exit_code
    return error


class _Items(ocp.args.Composite):
    """What is saved, by item."""


class _Written(future.ChainedFuture):
    """Waits for the writes of this process and its sums; then for all the others."""

    def result(self, timeout: float | None = None) -> None:
        """Raises, in every process, what went wrong in any of them."""
        problem = None
        try:
            super().result(timeout)
        except FAILURES as err:
            problem = err
        _agree("written", problem)


class _Sealing(ocp.CompositeCheckpointHandler):
    """Orbax's handler of several items, which leaves a manifest in what it writes."""

    whole: Manifest
    device: int  # that the folder was on when the save began

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        """Returns what to wait for, after the copies off the device."""
        writes = await super().async_save(directory, args) or []
        leave_sums = functools.partial(
            manifest.leave_sums, pathlib.Path(directory), jax.process_index()
        )
        return [_Written(writes, leave_sums)]

    def finalize(self, directory: Any) -> None:
        """Completes the folder in process 0, once all have written."""
        super().finalize(directory)
        folder = pathlib.Path(directory)
        # TensorStore makes folders that are missing, on the disk below if need be.
        if folder.stat().st_dev != self.device:
            raise OSError("another disk is there than when the save began")
        self.whole.seal(folder)


ocp.args.register_with_handler(_Sealing, for_save=True, for_restore=True)(_Items)


def _orbax() -> tuple[_Sealing, ocp.AsyncCheckpointer]:
    """Returns what writes a step, and what it does so with."""
    options = ocp.options.AsyncOptions(
        # The processes agree by themselves on what was written.
        barrier_sync_fn=lambda *, key, timeout_ms: None,
        # Folders are made while the loop waits: a disk that refuses them says so at
        # once, and leaves no threads that wait for them when the process ends.
        create_directories_asynchronously=False,
    )
    handler = _Sealing(
        composite_options=ocp.CompositeOptions(async_options=options),
        params=ocp.PyTreeCheckpointHandler(),
        rest=ocp.PyTreeCheckpointHandler(),
    )
    return handler, ocp.AsyncCheckpointer(handler, async_options=options)
