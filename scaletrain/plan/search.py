"""The layouts worth compiling, of all partitions of the devices and of the batch.

A layout is a set of overrides. The rules of the settings drop the impossible ones, and
`estimate` drops those that cannot fit or cannot be fast.
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
_LARGEST = 8  # of a tensor or context axis; more has not paid in a public recipe
_SLACK = 1.1  # estimates above this share of the memory are not compiled
_MOST_MICRO_BATCHES = 64
# The best few layouts are also compiled with unrolled layers, if they have headroom
# with scanned ones and the model is not too deep for the compiler.
_UNROLLED = 2
_HEADROOM_SHARE = 0.6  # the most of the memory that the scanned variant may need
_DEEPEST = 48  # layers: each takes the compiler half a second
# The residuals of a backward pass: (model.remat, model.remat_save).
_POLICIES = (
    ("full", ()),
    ("save", ("attention",)),
    ("save", ("query", "key", "value", "attention")),
    ("none", ()),
)


def layouts(run: RunConfig, slice_: Slice, most: int = MOST) -> list[Overrides]:
    """Returns the overrides of the most promising layouts, the fastest estimate first.

    Args:
      run: unresolved; its mesh, accumulation and remat are replaced.
      slice_: the devices.
      most: the largest number of layouts.
    """
    scored = []
    for overrides in _all(run, slice_):
        try:
            candidate = laid_out(run, overrides, slice_)
        except ConfigError:
            continue
        estimated = estimate(candidate, slice_)
        if estimated.peak_bytes <= _SLACK * slice_.chip.hbm_bytes:
            scored.append((estimated.step_time_s, estimated.peak_bytes, overrides))
    scored.sort(key=lambda entry: entry[:2])
    return _spread([overrides for _, _, overrides in scored], most)


def unrolled(
    run: RunConfig, scanned: Iterable[tuple[Overrides, float]]
) -> list[Overrides]:
    """Returns the unrolled variants, worth compiling, of layouts with scanned layers.

    Args:
      run: the settings that the layouts change.
      scanned: (overrides, share of the memory) of those that fit, best first.
    """
    if run.model.num_layers > _DEEPEST:
        return []
    small = [overrides for overrides, share in scanned if share <= _HEADROOM_SHARE]
    return [each | {"model.layers": "unroll"} for each in small[:_UNROLLED]]


def laid_out(run: RunConfig, overrides: Overrides, slice_: Slice) -> RunConfig:
    """Returns `run` with the overrides of a layout, resolved for the slice.

    Args:
      run: the settings that the layout changes.
      overrides: of the layout.
      slice_: the devices.

    Raises:
      ConfigError: the settings do not go together.
    """
    return config.resolve(config.applied(run, overrides), slice_.devices)


def _all(run: RunConfig, slice_: Slice) -> Iterator[Overrides]:
    """Yields every layout, possible or not, as overrides of all settings of a layout.

    Axes `expert` and `stage` stay at 1: the settings refuse them, since the model has
    neither experts nor stages.
    """
    inside = slice_.devices // slice_.num_slices
    model = run.model
    own = (model.remat, model.remat_save, model.remat_offload)
    policies = [own, *((*each, ()) for each in _POLICIES if (*each, ()) != own)]
    sizes = [size for size in factors(inside) if size <= _LARGEST]
    for tensor, context in itertools.product(sizes, sizes):
        if inside % (tensor * context):
            continue
        for fsdp in factors(inside // tensor // context):
            data = inside // tensor // context // fsdp
            counts = _micro_batches(run, data * fsdp * slice_.num_slices)
            for count, policy in itertools.product(counts, policies):
                yield {
                    "mesh.data": data,
                    "mesh.fsdp": fsdp,
                    "mesh.tensor": tensor,
                    "mesh.context": context,
                    **{f"mesh.dcn.{axis}": 1 for axis in AXES},
                    "mesh.dcn.data": slice_.num_slices,
                    "accumulate_steps": count,
                    "model.remat": policy[0],
                    "model.remat_save": policy[1],
                    "model.remat_offload": policy[2],
                    "model.layers": "scan",
                }


def _micro_batches(run: RunConfig, num_shards: int) -> list[int]:
    """Returns the possible numbers of micro-batches, each split into `num_shards`."""
    rows, rest = divmod(run.batch_size, num_shards)
    if rest:
        return []
    return [count for count in factors(rows) if count <= _MOST_MICRO_BATCHES]


def _mesh(overrides: Overrides) -> tuple[Any, ...]:
    return tuple(v for path, v in overrides.items() if path.startswith("mesh."))


def _spread(ranked: list[Overrides], most: int) -> list[Overrides]:
    """Returns the best layout of each promising mesh in turn, then the second best.

    So one mesh does not crowd out the others, and many meshes do not crowd out the
    second layout of one.
    """
    by_mesh: dict[tuple[Any, ...], list[Overrides]] = {}
    for overrides in ranked:
        by_mesh.setdefault(_mesh(overrides), []).append(overrides)
    promising = list(by_mesh.values())[: (most + 1) // 2]
    rounds = itertools.zip_longest(*promising)
    spread = [each for row in rounds for each in row if each is not None]
    return spread[:most]


def remedies(run: RunConfig, slice_: Slice) -> list[Overrides]:
    """Returns changes that make a step need less memory, the cheapest first."""
    counts = _micro_batches(run, run.batch_shards)
    counts = [count for count in counts if count > run.accumulate_steps]
    changes: list[Overrides] = [
        {"accumulate_steps": count} for count in (*counts[:1], *counts[-1:])
    ]
    remat: Overrides = {}
    if run.model.remat != "full":
        remat = {"model.remat": "full", "model.remat_save": ()}
    sharded: Overrides = {}
    if run.mesh.data > 1:
        sharded = {"mesh.data": 1, "mesh.fsdp": run.mesh.data * run.mesh.fsdp}
    changes += [remat, sharded]
    for tensor in (2, 4, 8):
        if run.mesh.fsdp % tensor == 0 and tensor > run.mesh.tensor:
            rest = run.mesh.fsdp * run.mesh.tensor // tensor
            changes.append({"mesh.fsdp": rest, "mesh.tensor": tensor})
    smallest = {"accumulate_steps": counts[-1]} if counts else {}
    changes += [smallest | remat, smallest | remat | sharded]
    unique = [
        each for i, each in enumerate(changes) if each and each not in changes[:i]
    ]
    return [
        each
        for each in unique
        if config.is_possible(config.applied(run, each), slice_.devices)
    ]
