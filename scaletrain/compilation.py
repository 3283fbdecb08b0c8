"""The train step compiled for the devices of its mesh.

With `model.remat=auto` candidates are compiled one after another, from the least
recomputation to the most, and the first that fits is used. Whether it fits is decided
by the peak memory that the compiler reports, against what a device may allocate; where
that limit is not known, as on CPUs, everything fits.
"""

import functools
import time
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding

from scaletrain import config
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.errors import ConfigError, does_not_fit
from scaletrain.hardware import chips
from scaletrain.matrices import REMAT_NAMES
from scaletrain.program import Program, build
from scaletrain.step import train_step

_SAVED = (  # values of a layer for the backward pass, from all to none
    ("none", ()),
    ("save", REMAT_NAMES),
    ("save", tuple(name for name in REMAT_NAMES if not name.startswith("mlp_"))),
    ("save", ("attention",)),
    ("full", ()),
)
CANDIDATES: tuple[dict[str, Any], ...] = tuple(
    {"model.remat": remat, "model.remat_save": names, "model.remat_offload": ()}
    for remat, names in _SAVED
)
# Share of the memory that a step may use. The rest is for the next batch, the buffers
# of an evaluation, and fragmentation.
_SHARE = 0.95


def compiled(
    program: Program,
    options: dict[str, Any] | None = None,
    ready: Callable[[], Any] = lambda: None,
) -> Any:
    """Returns `train_step` compiled for the program's devices.

    An option that the compiler does not know is left out with a warning.

    Args:
      program: on a mesh with devices.
      options: compiler options beside those of the chip.
      ready: called once the program is lowered: it waits until the devices are idle,
        because the compiler times kernels there to choose the fastest.
    """
    kind = cast(Mesh, program.mesh).devices.flat[0].device_kind
    lowered = jitted(program).lower(program.state, program.batch)
    chosen = chips.compiler_options(kind) | (options or {})
    ready()
    while True:
        try:
            return lowered.compile(compiler_options=chosen)
        except jax.errors.JaxRuntimeError as err:
            unknown = [name for name in chosen if f"option: '{name}'" in str(err)]
            if not unknown:
                raise
            value = chosen.pop(unknown[0])
            warnings.warn(
                f"compiler option {unknown[0]}={value}; this compiler does not know "
                "it; it is left out, and the step may be slower.",
                stacklevel=2,
            )


def jitted(program: Program) -> Any:
    """Returns `train_step` with state donated and shardings pinned, ready to lower."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    replicated = NamedSharding(program.mesh, jax.P())
    return jax.jit(
        functools.partial(train_step, program=program),
        in_shardings=(layout, {k: v.sharding for k, v in program.batch.items()}),
        out_shardings=(layout, replicated),
        donate_argnums=0,
    )


def decided(
    program: Program, asked: RunConfig, ready: Callable[[], Any] = lambda: None
) -> tuple[Program, Any]:
    """Returns the program with its `auto` settings decided, and its compiled step.

    Prints each decision.

    Args:
      program: as `build` returned it.
      asked: the settings before `program.build` decided any of them.
      ready: see `compiled`.

    Raises:
      ConfigError: model.remat=auto, and no candidate fits.
    """
    if asked.model.attention == "auto":
        say(f"attention: {program.run.model.attention} (auto)")
    began = time.perf_counter()
    if asked.model.remat == "auto":
        program, execute = _first_that_fits(program, ready)
    else:
        execute = compiled(program, ready=ready)
    say(f"compiled in {time.perf_counter() - began:.1f} s")
    return program, execute


def _first_that_fits(program: Program, ready: Callable[[], Any]) -> tuple[Program, Any]:
    """Returns the program of the first candidate that fits, and its compiled step."""
    limit, others = _limit_bytes(cast(Mesh, program.mesh)), []
    for (remat, names), overrides in zip(_SAVED, CANDIDATES, strict=True):
        run = config.applied(program.run, overrides)
        chosen = build(run, program.mesh)
        execute = _compiled_if_possible(chosen, ready)
        needed = None if execute is None else peak_bytes(execute)
        words = " ".join([remat, ",".join(names)]).strip()
        if _in_every_process(needed is not None and (limit is None or needed <= limit)):
            say(f"remat: {words} {_why(needed, limit)}" + "".join(others))
            return chosen, execute
        others.append(f"; {words} needs {_gb(needed)}")
    raise ConfigError(
        [
            f"model.remat=auto; nothing fits into {_gb(limit)} GB a device"
            f"{''.join(others)}; lower batch_size, or raise accumulate_steps."
        ]
    )


def peak_bytes(execute: Any) -> int:
    """Returns the peak bytes of a device while it runs the compiled step."""
    memory = execute.memory_analysis()
    # Temporaries in host memory, such as offloaded values, do not count.
    return memory.peak_memory_in_bytes - memory.host_temp_size_in_bytes


def _compiled_if_possible(program: Program, ready: Callable[[], Any]) -> Any:
    """Returns the compiled step; None if the compiler says that it does not fit."""
    try:
        return compiled(program, ready=ready)
    except jax.errors.JaxRuntimeError as err:
        if not does_not_fit(str(err)):
            raise
        return None


def _limit_bytes(mesh: Mesh) -> int | None:
    """Returns the bytes that a step may use on a device; None where not known."""
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    limits = [each["bytes_limit"] for each in stats if "bytes_limit" in each]
    return int(_SHARE * min(limits)) if limits else None


def _in_every_process(fits: bool) -> bool:
    """Returns whether `fits` in every process: all must choose the same candidate."""
    if jax.process_count() == 1:
        return fits
    return bool(np.all(multihost_utils.process_allgather(np.array(fits))))


def _why(needed: int | None, limit: int | None) -> str:
    if limit is None:
        return "(auto: these devices tell of no limit)"
    return f"fits in {_gb(needed)} of {_gb(limit)} GB"


def _gb(size: int | None) -> str:
    return "more than there is" if size is None else f"{size / 1e9:.1f}"
