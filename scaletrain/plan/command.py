"""`scaletrain plan`: what a run needs, takes and costs on a slice that is not here."""

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

_TRIED = 3  # remedies that are shown


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a plan beside the settings."""

    slices: tuple[Slice, ...]
    search: bool = False  # propose the layout
    full: bool = False  # down to machine code
    wanted: Wanted = dataclasses.field(default_factory=Wanted)


def request(args: argparse.Namespace) -> Request:
    """Returns what a command line asks for.

    Raises:
      ConfigError: no slice, one that does not exist, or figures that make no sense.
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


def run(run: RunConfig, request: Request) -> Record:
    """Returns the plan of `run`: of one slice, or the best of several.

    An interrupt ends it with what is known; `interrupted` tells of that.

    Raises:
      ConfigError: a layout the slice cannot hold, or no compiler.
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

    A slice among others that cannot be planned for is told of and left out.
    """
    runs = [run if request.search else resolved(run, s) for s in request.slices]
    records: list[Record] = []
    interrupted = False
    for whole, slice_ in zip(runs, request.slices, strict=True):
        try:
            if request.search:
                found, interrupted = _searched(run, slice_, request)
            else:
                chosen = _chosen(run, whole)
                found, interrupted = _planned(whole, slice_, request, chosen)
            records.append(found)
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
    run: RunConfig, slice_: Slice, request: Request, chosen: Overrides
) -> tuple[Record, bool]:
    """Returns the plan of resolved settings as they are, with remedies if need be.

    And whether an interrupt left some of those out.
    """
    full, found = request.full, {}
    known = compiler.knows(slice_)
    for remat in _candidates(run):
        run = search.laid_out(run, remat, slice_)
        said = compiler.compile(run, slice_, full=full) if known else None
        found = record.of(run, slice_, said, {**chosen, **remat}, request.wanted)
        if found["fits"]:
            return found, False
    tried, interrupted = _compiled(
        run, slice_, search.remedies(run, slice_), request, chosen
    )
    fitting = [each for each in tried if each["fits"]]
    found["remedies"] = record.best_first(fitting)[:_TRIED]
    if not fitting:
        nearest = sorted(tried, key=lambda each: each["hbm_peak_bytes"])
        found["tried"] = nearest[:_TRIED]
    return found, interrupted


def _candidates(run: RunConfig) -> tuple[Overrides, ...]:
    """Returns what model.remat=auto tries in turn, or no change."""
    if run.model.remat != "auto":
        return ({},)
    from scaletrain import compilation  # with the model; errors come without it

    return compilation.CANDIDATES


def resolved(run: RunConfig, slice_: Slice) -> RunConfig:
    """Returns `run` for the devices of the slice, and its parts across slices.

    Raises:
      ConfigError: the mesh does not cover the slice.
    """
    if slice_.num_slices > 1 and run.mesh.num_slices == 1:
        run = config.applied(run, {"mesh.dcn.data": slice_.num_slices})
    whole = config.resolve(run, slice_.devices, f"in {slice_.name}")
    if slice_.is_tpu and whole.mesh.num_slices != slice_.num_slices:
        raise ConfigError(
            [
                f"--num_slices={slice_.num_slices}; the axes of mesh.dcn are for "
                f"{whole.mesh.num_slices}; give that number, or set mesh.dcn.data="
                f"{slice_.num_slices} and its other axes to 1."
            ]
        )
    return whole


def _chosen(run: RunConfig, whole: RunConfig) -> Overrides:
    """Returns what `resolved` had to set, for the command that trains."""
    before, after = run.mesh.dcn.data, whole.mesh.dcn.data
    return {"mesh.dcn.data": after} if before != after and before != -1 else {}


def _searched(run: RunConfig, slice_: Slice, request: Request) -> tuple[Record, bool]:
    """Returns the best layout's plan with those it was chosen from.

    And whether an interrupt left some of those out.
    """
    layouts = search.layouts(run, slice_)
    if not layouts:
        raise ConfigError(
            [
                f"--search; no layout of {slice_.name} can hold this model; "
                "take a larger slice, or lower batch_size or seq_len."
            ]
        )
    found, interrupted = _compiled(run, slice_, layouts, request)
    if not found:
        if interrupted:
            raise KeyboardInterrupt
        raise PlanError("no layout was compiled; there is nothing to propose.")
    if not interrupted:
        roomy = [
            (each["overrides"], each["hbm_peak_bytes"] / slice_.chip.hbm_bytes)
            for each in record.best_first(found)
            if each["fits"]
        ]
        twins, interrupted = _compiled(
            run, slice_, search.unrolled(run, roomy), request
        )
        found += twins
    candidates = record.best_first(found)
    best = candidates[0]
    if best["fits"] and slice_.is_tpu and not interrupted:
        overrides = best["overrides"]
        whole = search.laid_out(run, overrides, slice_)
        print(f"plan: compiling the best of {len(found)} whole", file=sys.stderr)
        try:
            said = compiler.compile(whole, slice_, full=True)
            best = record.of(whole, slice_, said, overrides, request.wanted)
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
    chosen: Overrides | None = None,
) -> tuple[list[Record], bool]:
    """Returns the plans of `layouts`, and whether an interrupt left some out."""
    if not layouts:
        return [], False
    runs = [search.laid_out(run, overrides, slice_) for overrides in layouts]
    found: list[Record] = []
    progress = Progress(f"layouts of {slice_.name}", len(runs))
    try:
        with contextlib.closing(_reports(runs, slice_)) as reports:
            for index, said in reports:
                if isinstance(said, PlanError):
                    progress.tell(str(said))
                else:
                    overrides = (chosen or {}) | config.changes(run, layouts[index])
                    found.append(
                        record.of(runs[index], slice_, said, overrides, request.wanted)
                    )
                progress.advance()
    except KeyboardInterrupt:
        return found, True
    finally:
        progress.end()
    return found, False


def _reports(
    runs: Sequence[RunConfig], slice_: Slice
) -> Generator[tuple[int, Report | PlanError | None]]:
    """Yields (index, what the compiler says, if there is one) of each run."""
    if compiler.knows(slice_):
        yield from compiler.compile_all(runs, slice_)
    else:
        yield from ((index, None) for index in range(len(runs)))
