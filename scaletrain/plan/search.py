"""Layouts worth compiling: every cutting of the devices and of the batch, thinned out.

A layout is a set of overrides. What no mesh can hold is dropped by the settings' own
rules, what cannot fit or cannot be fast by `estimate`.
"""

import itertools
from collections.abc import Iterator
from typing import Any

from scaletrain import config
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError
from scaletrain.plan.estimate import estimate, factors
from scaletrain.plan.slices import Slice

MOST = 24  # layouts that are compiled
_LARGEST_TENSOR = 8  # beyond a host's chips it has not paid on any published recipe
_SLACK = 1.1  # estimates above this share of the memory are not compiled

Overrides = dict[str, Any]


def layouts(run: RunConfig, slice_: Slice, most: int = MOST) -> list[Overrides]:
    """Returns the overrides of the likeliest layouts, the fastest estimate first."""
    scored = []
    for overrides in _all(run, slice_):
        try:
            candidate = applied(run, overrides, slice_)
        except ConfigError:
            continue
        guess = estimate(candidate, slice_)
        if guess.peak_bytes <= _SLACK * slice_.hbm_bytes:
            scored.append((guess.step_time_s, guess.peak_bytes, overrides))
    scored.sort(key=lambda entry: entry[:2])
    return _spread([overrides for _, _, overrides in scored], most)


def applied(run: RunConfig, overrides: Overrides, slice_: Slice) -> RunConfig:
    """Returns `run` with `overrides`, resolved for the slice.

    Raises:
      ConfigError: the settings do not go together.
    """
    for path, value in overrides.items():
        run = config.replaced(run, path, value)
    return config.resolve(config.check(run), slice_.devices)


def _all(run: RunConfig, slice_: Slice) -> Iterator[Overrides]:
    """Yields every layout, possible or not, as overrides of everything it decides."""
    inside = slice_.devices // slice_.num_slices
    remats = ("full", "save", "none")
    for tensor in factors(inside):
        if tensor > _LARGEST_TENSOR:
            break
        for fsdp in factors(inside // tensor):
            data = inside // tensor // fsdp
            ways = data * fsdp * slice_.num_slices
            for parts, remat in itertools.product(_parts(run, ways), remats):
                yield {
                    "mesh.data": data,
                    "mesh.fsdp": fsdp,
                    "mesh.tensor": tensor,
                    "mesh.context": 1,
                    "mesh.dcn.data": slice_.num_slices,
                    "accumulate_steps": parts,
                    "model.remat": remat,
                    "model.remat_save": ("attention",) if remat == "save" else (),
                    "model.layers": "scan",
                }


def _parts(run: RunConfig, ways: int) -> list[int]:
    """Returns the numbers of parts in which a batch divides over `ways` devices."""
    whole, rest = divmod(run.batch_size, ways)
    return [] if rest else [parts for parts in factors(whole) if parts <= 64]


def _spread(ranked: list[Overrides], most: int) -> list[Overrides]:
    """Returns the best of each mesh in turn, so that one does not crowd out others."""
    by_mesh: dict[tuple[Any, ...], list[Overrides]] = {}
    for overrides in ranked:
        key = tuple(overrides[f"mesh.{name}"] for name in ("data", "fsdp", "tensor"))
        by_mesh.setdefault(key, []).append(overrides)
    rounds = itertools.zip_longest(*by_mesh.values())
    found = [each for row in rounds for each in row if each is not None]
    return found[:most]


def remedies(run: RunConfig, slice_: Slice) -> list[Overrides]:
    """Returns changes that make a step smaller, the cheapest first."""
    found: list[Overrides] = []
    ways = run.mesh.data * run.mesh.fsdp * slice_.num_slices
    parts = [p for p in _parts(run, ways) if p > run.accumulate_steps]
    found += [{"accumulate_steps": p} for p in (*parts[:1], *parts[-1:])]
    if run.model.remat != "full":
        found.append({"model.remat": "full", "model.remat_save": ()})
    if run.mesh.data > 1:
        whole = run.mesh.data * run.mesh.fsdp
        found.append({"mesh.data": 1, "mesh.fsdp": whole})
    for tensor in (2, 4, 8):
        if run.mesh.fsdp % tensor == 0 and tensor > run.mesh.tensor:
            rest = run.mesh.fsdp * run.mesh.tensor // tensor
            found.append({"mesh.fsdp": rest, "mesh.tensor": tensor})
    if parts and run.model.remat != "full":
        found.append(
            {
                "accumulate_steps": parts[-1],
                "model.remat": "full",
                "model.remat_save": (),
            }
        )
    return [o for o in found if _possible(run, o, slice_)]


def _possible(run: RunConfig, overrides: Overrides, slice_: Slice) -> bool:
    try:
        applied(run, overrides, slice_)
    except ConfigError:
        return False
    return True


def spelled(overrides: Overrides, run: RunConfig) -> dict[str, Any]:
    """Returns the overrides that differ from `run`, as they are written."""
    now = {path: value for path, _, value in config.leaves(run)}
    return {path: value for path, value in overrides.items() if now[path] != value}


def flags(overrides: Overrides) -> list[str]:
    """Returns the overrides as words of a command line."""

    def text(value: Any) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    return [f"--config.{path}={text(value)}" for path, value in overrides.items()]
