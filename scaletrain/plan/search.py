"""Layouts worth compiling: every cutting of the devices and of the batch, thinned out.

A layout is a set of overrides. What no mesh can hold is dropped by the settings' own
rules, what cannot fit or cannot be fast by `estimate`.
"""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from scaletrain import config
from scaletrain.config import AXES, Overrides, RunConfig
from scaletrain.errors import ConfigError
from scaletrain.hardware.slices import Slice
from scaletrain.plan.estimate import estimate, factors

MOST = 22  # layouts that are compiled, with scanned layers
_LARGEST = 8  # parts of a tensor or context axis; more has not paid in a public recipe
_SLACK = 1.1  # estimates above this share of the memory are not compiled
_TWINS = 2  # of those, the best, that are also tried with their layers unrolled,
_ROOMY = 0.6  # if the scan needs no more than this share of the memory,
_DEEPEST = 48  # and if there are so few: each takes the compiler half a second
# What a backward pass finds saved: (model.remat, model.remat_save).
_POLICIES = (
    ("full", ()),
    ("save", ("attention",)),
    ("save", ("query", "key", "value", "attention")),
    ("none", ()),
)


def layouts(run: RunConfig, slice_: Slice, most: int = MOST) -> list[Overrides]:
    """Returns the overrides of the likeliest layouts, the fastest estimate first."""
    scored = []
    for overrides in _all(run, slice_):
        try:
            candidate = laid_out(run, overrides, slice_)
        except ConfigError:
            continue
        guess = estimate(candidate, slice_)
        if guess.peak_bytes <= _SLACK * slice_.chip.hbm_bytes:
            scored.append((guess.step_time_s, guess.peak_bytes, overrides))
    scored.sort(key=lambda entry: entry[:2])
    return _spread([overrides for _, _, overrides in scored], most)


def unrolled(
    run: RunConfig, found: Iterable[tuple[Overrides, float]]
) -> list[Overrides]:
    """Returns layouts without a scan, worth compiling by what is known with it.

    Args:
      found: overrides of those that fit, best first, and what share of the memory
        each takes.
    """
    if run.model.num_layers > _DEEPEST:
        return []
    small = [overrides for overrides, share in found if share <= _ROOMY]
    return [each | {"model.layers": "unroll"} for each in small[:_TWINS]]


def laid_out(run: RunConfig, overrides: Overrides, slice_: Slice) -> RunConfig:
    """Returns `run` with `overrides`, resolved for the slice.

    Raises:
      ConfigError: the settings do not go together.
    """
    return config.resolve(config.applied(run, overrides), slice_.devices)


def _all(run: RunConfig, slice_: Slice) -> Iterator[Overrides]:
    """Yields every layout, possible or not, as overrides of everything it decides.

    Axes `expert` and `stage` stay at 1: the settings refuse them, since the model has
    neither experts nor stages.
    """
    inside = slice_.devices // slice_.num_slices
    model = run.model
    own = (model.remat, model.remat_save, model.remat_offload)
    policies = [own, *((*each, ()) for each in _POLICIES if (*each, ()) != own)]
    cut = [size for size in factors(inside) if size <= _LARGEST]
    for tensor, context in itertools.product(cut, cut):
        if inside % (tensor * context):
            continue
        for fsdp in factors(inside // tensor // context):
            data = inside // tensor // context // fsdp
            ways = data * fsdp * slice_.num_slices
            for parts, policy in itertools.product(_parts(run, ways), policies):
                yield {
                    "mesh.data": data,
                    "mesh.fsdp": fsdp,
                    "mesh.tensor": tensor,
                    "mesh.context": context,
                    **{f"mesh.dcn.{axis}": 1 for axis in AXES},
                    "mesh.dcn.data": slice_.num_slices,
                    "accumulate_steps": parts,
                    "model.remat": policy[0],
                    "model.remat_save": policy[1],
                    "model.remat_offload": policy[2],
                    "model.layers": "scan",
                }


def _parts(run: RunConfig, ways: int) -> list[int]:
    """Returns the numbers of parts in which a batch divides over `ways` devices."""
    whole, rest = divmod(run.batch_size, ways)
    return [] if rest else [parts for parts in factors(whole) if parts <= 64]


def _mesh(overrides: Overrides) -> tuple[Any, ...]:
    return tuple(v for path, v in overrides.items() if path.startswith("mesh."))


def _spread(ranked: list[Overrides], most: int) -> list[Overrides]:
    """Returns the best of each of the likeliest meshes in turn, then the second best.

    One mesh does not crowd out the others, nor many of them the ways to use one.
    """
    by_mesh: dict[tuple[Any, ...], list[Overrides]] = {}
    for overrides in ranked:
        by_mesh.setdefault(_mesh(overrides), []).append(overrides)
    likeliest = list(by_mesh.values())[: (most + 1) // 2]
    rounds = itertools.zip_longest(*likeliest)
    found = [each for row in rounds for each in row if each is not None]
    return found[:most]


def remedies(run: RunConfig, slice_: Slice) -> list[Overrides]:
    """Returns changes that make a step smaller, the cheapest first."""
    found: list[Overrides] = []
    ways = run.batch_shards
    parts = [p for p in _parts(run, ways) if p > run.accumulate_steps]
    found += [{"accumulate_steps": p} for p in (*parts[:1], *parts[-1:])]
    again: Overrides = {}
    if run.model.remat != "full":
        again = {"model.remat": "full", "model.remat_save": ()}
    cut: Overrides = {}
    if run.mesh.data > 1:
        cut = {"mesh.data": 1, "mesh.fsdp": run.mesh.data * run.mesh.fsdp}
    found += [again, cut]
    for tensor in (2, 4, 8):
        if run.mesh.fsdp % tensor == 0 and tensor > run.mesh.tensor:
            rest = run.mesh.fsdp * run.mesh.tensor // tensor
            found.append({"mesh.fsdp": rest, "mesh.tensor": tensor})
    least = {"accumulate_steps": parts[-1]} if parts else {}
    found += [least | again, least | again | cut]
    once = [each for i, each in enumerate(found) if each and each not in found[:i]]
    return [
        each
        for each in once
        if config.is_possible(config.applied(run, each), slice_.devices)
    ]
