"""The command `scaletrain plan`: memory, time and cost of a run on other devices."""

import argparse
import contextlib
import dataclasses
import math
import sys
from collections.abc import Generator, Sequence

from scaletrain import config
from scaletrain.config import Overrides, RunConfig
from scaletrain.errors import ConfigError, PlanError
from scaletrain.footprint import cost
from scaletrain.hardware import slices
from scaletrain.hardware.slices import Slice
from scaletrain.plan import compiler, record, search
from scaletrain.plan.compiler import Report
from scaletrain.plan.progress import Progress
from scaletrain.plan.record import Record, Wanted

_SHOWN = 3  # remedies, or vain attempts, in a plan


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line of a plan, without the settings."""

    slices: tuple[Slice, ...]
    search: bool = False  # propose the layout
    full: bool = False  # compile to machine code
    wanted: Wanted = dataclasses.field(default_factory=Wanted)


def request(args: argparse.Namespace) -> Request:
    """Returns the request in a parsed command line.

    Raises:
      ConfigError: no slice, an unknown slice, or figures that make no sense.
    """
    if bool(args.topology) == bool(args.topologies):
        raise ConfigError(
            ["--topology, --topologies; give one of the two, such as v5p:4x4x4."]
        )
    names = [args.topology] if args.topology else args.topologies.split(",")
    prices = {
        name: getattr(args, name)
        for name in (
            "region", "price_per_chip_hour", "watts_per_chip", "pue", "grid_g_per_kwh",
        )
    }  # fmt: skip
    cost.check(**prices)
    if not 0 <= args.tokens < math.inf:
        raise ConfigError(
            [f"--tokens={args.tokens}; not a number of tokens; give 1e9."]
        )
    return Request(
        slices=tuple(slices.parse(name.strip(), args.num_slices) for name in names),
        search=args.search,
        full=args.full,
        wanted=Wanted(args.config, tuple(args.overrides), args.tokens, prices),
    )


def plan(run: RunConfig, request: Request) -> Record:
    """Returns the plan of a run: for one slice, or for the best of several.

    Ctrl-C returns the plans finished so far, with `interrupted` set in the record.

    Raises:
      ConfigError: the slice cannot hold the layout, or has no compiler.
      PlanError: the compiler refused the step.
    """
    for slice_ in request.slices:
        compiler.knows(slice_)
    records, interrupted = _each(run, request)
    if len(records) == 1:
        return records[0] | {"interrupted": interrupted}
    best = record.best_first(records)[0]
    return best | record.compared(records) | {"interrupted": interrupted}


def _each(run: RunConfig, request: Request) -> tuple[list[Record], bool]:
    """Returns the plans of the slices, and whether an interrupt left some out.

    A slice for which planning fails is reported and left out, if there are others.
    """
    runs = [run if request.search else resolved(run, s) for s in request.slices]
    records: list[Record] = []
    interrupted = False
    for complete, slice_ in zip(runs, request.slices, strict=True):
        try:
            if request.search:
                planned, interrupted = _searched(run, slice_, request)
            else:
                overrides = _overrides(run, complete)
                planned, interrupted = _planned(complete, slice_, request, overrides)
            records.append(planned)
        except (ConfigError, PlanError) as err:
            if not records and slice_ is request.slices[-1]:
                raise
            print(f"plan: {slice_.name} is left out; {err}", file=sys.stderr)
        except KeyboardInterrupt:
            if not records:
                raise
            interrupted = True
        if interrupted:
            print("plan: stopped; this is what is known", file=sys.stderr)
            break
    return records, interrupted


def _planned(
    run: RunConfig, slice_: Slice, request: Request, overrides: Overrides
) -> tuple[Record, bool]:
    """Returns the plan of one layout, and whether an interrupt left out remedies.

    A plan that does not fit lists the remedies that make it fit or, if none does, the
    nearest attempts.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices.
      request: the command line.
      overrides: the planner's changes to the user's settings so far.
    """
    full, planned = request.full, {}
    has_compiler = compiler.knows(slice_)
    for remat in _candidates(run):
        run = search.laid_out(run, remat, slice_)
        report = compiler.compile(run, slice_, full=full) if has_compiler else None
        planned = record.of(run, slice_, report, {**overrides, **remat}, request.wanted)
        if planned["fits"]:
            return planned, False
    tried, interrupted = _compiled(
        run, slice_, search.remedies(run, slice_), request, overrides
    )
    fitting = [each for each in tried if each["fits"]]
    planned["remedies"] = record.best_first(fitting)[:_SHOWN]
    if not fitting:
        nearest = sorted(tried, key=lambda each: each["hbm_peak_bytes"])
        planned["tried"] = nearest[:_SHOWN]
    return planned, interrupted


def _candidates(run: RunConfig) -> tuple[Overrides, ...]:
    """Returns the changes that model.remat=auto tries in turn, or one empty change."""
    if run.model.remat != "auto":
        return ({},)
    from scaletrain import compilation  # imports the model; errors come faster without

    return compilation.CANDIDATES


def resolved(run: RunConfig, slice_: Slice) -> RunConfig:
    """Returns `run` resolved for the devices of a slice.

    Over several slices the batch is sharded, if the run's mesh is for one slice.

    Raises:
      ConfigError: the mesh does not cover the slice.
    """
    if slice_.num_slices > 1 and run.mesh.num_slices == 1:
        run = config.applied(run, {"mesh.dcn.data": slice_.num_slices})
    complete = config.resolve(run, slice_.devices, f"in {slice_.name}")
    if slice_.is_tpu and complete.mesh.num_slices != slice_.num_slices:
        raise ConfigError(
            [
                f"--num_slices={slice_.num_slices}; the axes of mesh.dcn are for "
                f"{complete.mesh.num_slices}; give that number, or set mesh.dcn.data="
                f"{slice_.num_slices} and its other axes to 1."
            ]
        )
    return complete


def _overrides(run: RunConfig, complete: RunConfig) -> Overrides:
    """Returns the settings that `resolved` changed, for the command that trains.

    The other resolved settings follow from the devices when training starts.
    """
    before, after = run.mesh.dcn.data, complete.mesh.dcn.data
    return {"mesh.dcn.data": after} if before != after and before != -1 else {}


def _searched(run: RunConfig, slice_: Slice, request: Request) -> tuple[Record, bool]:
    """Returns the plan of the best layout, and whether an interrupt left some out.

    The record lists the plans of all candidates, the best first.
    """
    layouts = search.layouts(run, slice_)
    if not layouts:
        raise ConfigError(
            [
                f"--search; no layout of {slice_.name} can hold this model; "
                "take a larger slice, or lower batch_size or seq_len."
            ]
        )
    planned, interrupted = _compiled(run, slice_, layouts, request)
    if not planned:
        if interrupted:
            raise KeyboardInterrupt
        raise PlanError("no layout was compiled; there is nothing to propose.")
    if not interrupted:
        scanned = [
            (each["overrides"], each["hbm_peak_bytes"] / slice_.chip.hbm_bytes)
            for each in record.best_first(planned)
            if each["fits"]
        ]
        unrolled, interrupted = _compiled(
            run, slice_, search.unrolled(run, scanned), request
        )
        planned += unrolled
    candidates = record.best_first(planned)
    best = candidates[0]
    if best["fits"] and slice_.is_tpu and not interrupted:
        overrides = best["overrides"]
        complete = search.laid_out(run, overrides, slice_)
        print(f"plan: compiling the best of {len(planned)} whole", file=sys.stderr)
        try:
            report = compiler.compile(complete, slice_, full=True)
            best = record.of(complete, slice_, report, overrides, request.wanted)
        except PlanError as err:
            print(f"plan: {err}", file=sys.stderr)
        except KeyboardInterrupt:
            interrupted = True
    return best | {"candidates": candidates}, interrupted


def _compiled(
    run: RunConfig,
    slice_: Slice,
    layouts: Sequence[Overrides],
    request: Request,
    before: Overrides | None = None,
) -> tuple[list[Record], bool]:
    """Returns the plans of several layouts, and whether an interrupt left some out.

    Args:
      run: the settings that the layouts change.
      slice_: the devices.
      layouts: overrides of each.
      request: the command line.
      before: the planner's changes to the user's settings that led to `run`.
    """
    if not layouts:
        return [], False
    runs = [search.laid_out(run, overrides, slice_) for overrides in layouts]
    records: list[Record] = []
    progress = Progress(f"layouts of {slice_.name}", len(runs))
    try:
        with contextlib.closing(_reports(runs, slice_)) as reports:
            for index, report in reports:
                if isinstance(report, PlanError):
                    progress.log(str(report))
                else:
                    overrides = (before or {}) | config.changes(run, layouts[index])
                    complete, wanted = runs[index], request.wanted
                    records.append(
                        record.of(complete, slice_, report, overrides, wanted)
                    )
                progress.advance()
    except KeyboardInterrupt:
        return records, True
    finally:
        progress.end()
    return records, False


def _reports(
    runs: Sequence[RunConfig], slice_: Slice
) -> Generator[tuple[int, Report | PlanError | None]]:
    """Yields (index, report or refusal) of each run; None without a compiler."""
    if compiler.knows(slice_):
        yield from compiler.compile_all(runs, slice_)
    else:
        yield from ((index, None) for index in range(len(runs)))
