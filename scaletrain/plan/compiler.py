"""The compilers as a function from settings and a slice to a report.

Each compilation has a process of its own, because the compiler keeps global state, and
is stopped as soon as it has assigned the buffers.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

from scaletrain import config, hlo
from scaletrain.config import AXES, RunConfig
from scaletrain.errors import ConfigError, PlanError, does_not_fit
from scaletrain.hardware.slices import Slice
from scaletrain.plan import memory, schedule

_TIMEOUT_S = 1800
_POLL_S = 0.02
_LEAST_ROOM = 2**20  # free bytes on the disk; the compiler does not report a full one
# The environment of the TPU compiler on a machine without TPUs.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process dies on a lock file
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; silences a warning
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
_COMPILERS = {  # by platform: packages, one of which is enough
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The memory and the time of one step on one device of a slice."""

    parameters: int  # of the model, on all devices
    fits: bool  # the compiler accepted the program
    peak_bytes: int
    host_bytes: int  # offloaded to the host's memory; not in `peak_bytes`
    by_class: dict[str, int]  # bytes; they add up to `peak_bytes`
    largest: list[tuple[int, str]]  # (bytes, shape and origin) of temporary values
    step: schedule.Step
    full: bool  # compiled to machine code
    # Of the executable, if there is one: the bytes that it allocates, and the most of
    # them that are in use at the same time.
    executable_bytes: int | None
    live_bytes: int | None


def knows(slice_: Slice) -> bool:
    """Returns whether a compiler for the slice is installed.

    Plans for GPUs do without: `estimate` takes its place.

    Raises:
      ConfigError: the TPU compiler is not installed.
    """
    installed = any(map(importlib.util.find_spec, _COMPILERS[slice_.platform]))
    if slice_.is_tpu and not installed:
        raise ConfigError(
            [
                "plan; libtpu, the TPU compiler, is not installed; "
                "pip install -e '.[plan]' in the clone."
            ]
        )
    return installed


def compile(run: RunConfig, slice_: Slice, *, full: bool = False) -> Report:
    """Returns the compiler's report of the step of a run on a slice.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices to compile for.
      full: compile to machine code (minutes), not only up to buffer assignment.

    Raises:
      PlanError: the compiler refused the program for another reason than its memory.
    """
    ((_, report),) = compile_all([run], slice_, full=full)
    if isinstance(report, PlanError):
        raise report
    return report


def compile_all(
    runs: Sequence[RunConfig], slice_: Slice, *, full: bool = False
) -> Iterator[tuple[int, Report | PlanError]]:
    """Yields (index, report or refusal) of each run, in the order in which they end.

    The compilations run in parallel. A consumer that stops early, by an interrupt or
    not, ends those still under way.

    Args:
      runs: resolved for the devices of the slice.
      slice_: the devices to compile for.
      full: compile to machine code, not only up to buffer assignment.
    """
    waiting = list(enumerate(runs))[::-1]
    num_processes = max(1, os.cpu_count() or 2)
    running: dict[int, _Compilation] = {}
    try:
        while waiting or running:
            while waiting and len(running) < num_processes:
                index, run = waiting.pop()
                running[index] = _Compilation(run, slice_, full)
            time.sleep(_POLL_S)
            for index in [i for i, each in running.items() if each.ended()]:
                report = running[index].report()
                running.pop(index).close()
                yield index, report
    finally:
        for each in running.values():
            each.close()


class _Compilation:
    """One compiler process, and the folder in which it writes."""

    def __init__(self, run: RunConfig, slice_: Slice, full: bool):
        self._run, self._slice, self._full = run, slice_, full
        try:
            _check_room(pathlib.Path(tempfile.gettempdir()))
            self._temporary = tempfile.TemporaryDirectory(
                prefix="scaletrain-plan-", ignore_cleanup_errors=True
            )
        except OSError as err:
            raise _no_room(str(err)) from err
        self._folder = pathlib.Path(self._temporary.name)
        self._began = time.monotonic()
        request = {
            "planner": os.getpid(),
            "config": config.to_json(run),
            "topology": slice_.topology,
            "platform": slice_.platform,
            "kwargs": slice_.kwargs,
            "full": full,
        }
        (self._folder / "request.json").write_text(json.dumps(request), "utf-8")
        # Set before the process begins: some are read as soon as jax is imported.
        dump = f"--xla_dump_to={self._folder} --xla_dump_hlo_as_text"
        environment = os.environ | WITHOUT_TPU
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": dump,
            "TMPDIR": str(self._folder),  # for libtpu's logs, which no flag disables
        }
        with (self._folder / "stderr").open("wb") as stderr:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "scaletrain.plan.compile_worker",
                    str(self._folder),
                ],
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # an interrupt is for the planner to answer
            )

    def close(self) -> None:
        """Ends the process, if it still runs, and removes the folder."""
        self._process.kill()
        self._process.wait()
        self._temporary.cleanup()

    def ended(self) -> bool:
        """Returns whether the process has ended, so that its report can be read.

        Raises:
          PlanError: the disk has no room for the report.
        """
        if time.monotonic() - self._began > _TIMEOUT_S:
            self._process.kill()
        ended = self._process.poll() is not None
        _check_room(self._folder.parent)
        return ended

    def report(self) -> Report | PlanError:
        """Returns the report of the ended process, or its refusal of the step."""
        errors = (self._folder / "stderr").read_text("utf-8", "replace").splitlines()
        for line in errors:
            if "Warning: compiler option" in line:
                print(f"plan: {line.partition('Warning: ')[2]}", file=sys.stderr)
        answer = self._folder / "answer.json"
        if not answer.is_file():
            last = ([line for line in errors if line.strip()] or ["no word"])[-1]
            return PlanError(f"the compiler's process ended without an answer: {last}")
        facts = json.loads(answer.read_text("utf-8"))
        error = facts.get("error", "")
        if error and not does_not_fit(error):
            return PlanError(f"the compiler refused the step: {error.splitlines()[0]}")
        return _report(self._folder, facts, self._run, self._slice, full=self._full)


def _check_room(folder: pathlib.Path) -> None:
    free = shutil.disk_usage(folder).free
    if free < _LEAST_ROOM:
        raise _no_room(f"{folder} has {free:,} bytes left")


def _no_room(why: str) -> PlanError:
    return PlanError(
        f"TMPDIR; {why}; set it to a folder with room for what the compiler writes, "
        "a few hundred MB."
    )


def _report(
    folder: pathlib.Path,
    facts: dict[str, Any],
    run: RunConfig,
    slice_: Slice,
    *,
    full: bool,
) -> Report:
    """Returns the report of a compilation.

    Args:
      folder: of the compiler's dump.
      facts: the answer of the process.
      run: resolved for the devices of the slice.
      slice_: the devices for which it was compiled.
      full: asked to compile to machine code.
    """

    def dumped(suffix: str) -> str:
        (path,) = folder.glob(f"*jit_train_step*after_optimizations{suffix}.txt")
        return path.read_text(encoding="utf-8")

    module = hlo.parse(dumped(""))
    usage = memory.usage(
        dumped("-memory-usage-report"),
        dumped("-buffer-assignment"),
        module,
        facts["shapes"],
    )
    return Report(
        parameters=facts["parameters"],
        fits="error" not in facts,
        peak_bytes=usage.total_bytes,
        host_bytes=usage.host_bytes,
        by_class=memory.by_class(usage, facts["bytes"]),
        largest=usage.largest,
        step=schedule.account(module, axes(run), slice_),
        # The GPU compiler cannot be stopped at buffer assignment.
        full=full or not slice_.is_tpu,
        executable_bytes=facts.get("executable_bytes"),
        live_bytes=facts.get("live_bytes"),
    )


def axes(run: RunConfig) -> dict[str, int]:
    """Returns the size of each mesh axis, in the order of the devices."""
    return {axis: run.mesh.size(axis) for axis in AXES}
