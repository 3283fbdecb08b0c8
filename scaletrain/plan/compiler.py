"""The compilers as a function: settings and a slice in, its report out.

Each compilation has a process of its own: the compiler keeps global state, and is
stopped as soon as it has assigned the buffers.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from scaletrain import config
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError, PlanError
from scaletrain.mesh import AXES
from scaletrain.plan import hlo, memory, timing
from scaletrain.plan.slices import Slice

_TIMEOUT_S = 1800
# The environment of a TPU's compiler on a machine that has none.
WITHOUT_TPU = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # or a second process dies on a lock file
    "TPU_SKIP_MDS_QUERY": "1",  # there is no machine to ask
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # any; silences a warning
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
}
_COMPILERS = {  # packages, one of which it takes
    "tpu": ("libtpu",),
    "cuda": ("jax_cuda13_plugin", "jax_cuda12_plugin"),
}


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler says of one step on one device of a slice."""

    parameters: int
    fits: bool
    peak_bytes: int
    host_bytes: int  # beside it, in the host's memory
    by_class: dict[str, int]  # bytes; they add up to `peak_bytes`
    largest: list[tuple[int, str]]  # (bytes, what it is), of the peak
    step: timing.Step
    full: bool  # compiled to machine code
    executable_bytes: int | None  # peak by the executable's own word, if there is one


def knows(slice_: Slice) -> bool:
    """Returns whether there is a compiler for the slice; a GPU can do without.

    Raises:
      ConfigError: a TPU's is not installed.
    """
    found = any(map(importlib.util.find_spec, _COMPILERS[slice_.platform]))
    if slice_.is_tpu and not found:
        raise ConfigError(
            [
                "plan; libtpu, the TPU compiler, is not installed; "
                "pip install 'scaletrain[plan]'."
            ]
        )
    return found


def compile(run: RunConfig, slice_: Slice, *, full: bool = False) -> Report:
    """Returns what the compiler says of the step of a resolved `run` on `slice_`.

    Raises:
      PlanError: it refused the program for another reason than its memory.
    """
    with tempfile.TemporaryDirectory(prefix="scaletrain-plan-") as name:
        folder = pathlib.Path(name)
        answer = _asked(folder, run, slice_, full=full)
        error = answer.get("error", "")
        if error and "RESOURCE_EXHAUSTED" not in error:
            raise PlanError(f"the compiler refused the step: {error.splitlines()[0]}")
        return _report(folder, answer, run, slice_, full=full)


def _asked(
    folder: pathlib.Path, run: RunConfig, slice_: Slice, *, full: bool
) -> dict[str, Any]:
    """Returns the worker's answer; its dump lies in `folder`."""
    request = {
        "config": config.to_json(run),
        "topology": slice_.topology,
        "platform": slice_.platform,
        "kwargs": slice_.kwargs,
        "full": full,
    }
    (folder / "request.json").write_text(json.dumps(request), encoding="utf-8")
    # Set before the process begins: some are read as soon as jax is imported.
    environment = (
        os.environ
        | WITHOUT_TPU
        | {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text",
        }
    )
    done = subprocess.run(
        [sys.executable, "-m", "scaletrain.plan.worker", str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    for line in done.stderr.splitlines():
        if "Warning: compiler option" in line:
            print(f"plan: {line.partition('Warning: ')[2]}", file=sys.stderr)
    answer = folder / "answer.json"
    if not answer.is_file():
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise PlanError(f"the compiler's process ended without an answer: {last}")
    return json.loads(answer.read_text(encoding="utf-8"))


def _report(
    folder: pathlib.Path,
    answer: dict[str, Any],
    run: RunConfig,
    slice_: Slice,
    *,
    full: bool,
) -> Report:
    def dumped(what: str) -> str:
        (path,) = folder.glob(f"*jit_train_step*after_optimizations{what}.txt")
        return path.read_text(encoding="utf-8")

    module = hlo.parse(dumped(""))
    usage = memory.usage(
        dumped("-memory-usage-report"), dumped("-buffer-assignment"), module
    )
    return Report(
        parameters=answer["parameters"],
        fits="error" not in answer,
        peak_bytes=usage.total_bytes,
        host_bytes=usage.host_bytes,
        by_class=memory.by_class(usage.total_bytes, answer["bytes"]),
        largest=usage.largest,
        step=timing.account(module, axes(run), slice_),
        # There is no stopping the GPUs' compiler on its way.
        full=full or not slice_.is_tpu,
        executable_bytes=answer.get("peak_bytes"),
    )


def axes(run: RunConfig) -> dict[str, int]:
    """Returns the size of each mesh axis, in the order of the devices."""
    return {
        name: getattr(run.mesh, name) * getattr(run.mesh.dcn, name) for name in AXES
    }
