"""`scaletrain plan`: what a run needs, takes and costs on a slice that is not here."""

import argparse
import concurrent.futures
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any

from scaletrain import config, metrics
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError, PlanError
from scaletrain.mesh import AXES
from scaletrain.plan import compiler, cost, search, slices
from scaletrain.plan.compiler import Report
from scaletrain.plan.estimate import estimate, parameters
from scaletrain.plan.search import Overrides
from scaletrain.plan.slices import Slice
from scaletrain.remat import CANDIDATES

_TRIED = 3  # remedies that are shown


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a plan beside the settings."""

    slices: tuple[Slice, ...]
    search: bool = False  # propose the layout
    full: bool = False  # down to machine code
    tokens: float = 0.0  # 0 = those of num_steps
    spec: str = ""  # the experiment, as it was named
    prices: dict[str, Any] = dataclasses.field(default_factory=dict)  # see cost.of


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
    if args.tokens < 0:
        raise ConfigError([f"--tokens={args.tokens}; below 0; give 0 or more."])
    return Request(
        slices=tuple(slices.parse(name, args.num_slices) for name in names),
        search=args.search,
        full=args.full,
        tokens=args.tokens,
        spec=args.config,
        prices=prices,
    )


def run(run: RunConfig, request: Request) -> dict[str, Any]:
    """Returns the plan of `run`: of one slice, or the best of several.

    Raises:
      ConfigError: a layout the slice cannot hold, or no compiler.
      PlanError: the compiler refused the step.
    """
    for slice_ in request.slices:
        compiler.knows(slice_)
    records = []
    for slice_ in request.slices:
        if request.search:
            records.append(_searched(run, slice_, request))
        else:
            records.append(_planned(run, slice_, request))
    if len(records) == 1:
        return records[0]
    return _best_first(records)[0] | {"slices": records}


def _planned(run: RunConfig, slice_: Slice, request: Request) -> dict[str, Any]:
    """Returns the plan of the settings as they are, with remedies if need be."""
    run = resolved(run, slice_)
    record = {}
    for overrides in CANDIDATES if run.model.remat == "auto" else ({},):
        run = search.applied(run, overrides, slice_)
        record = _record(run, slice_, overrides, request, full=request.full)
        if record["fits"]:
            return record
    tried = _compiled(run, slice_, search.remedies(run, slice_), request)
    fitting = [r for r in tried if r["fits"]]
    record["remedies"] = _best_first(fitting)[:_TRIED]
    return record


def resolved(run: RunConfig, slice_: Slice) -> RunConfig:
    """Returns `run` for the devices of the slice, and its parts across slices."""
    outer = [getattr(run.mesh.dcn, name) for name in AXES]
    if slice_.num_slices > 1 and all(size == 1 for size in outer):
        run = config.replaced(run, "mesh.dcn.data", slice_.num_slices)
    return config.resolve(run, slice_.devices)


def _searched(run: RunConfig, slice_: Slice, request: Request) -> dict[str, Any]:
    """Returns the best layout's plan, and those it was chosen from."""
    found = search.layouts(run, slice_)
    if not found:
        raise ConfigError(
            [
                f"--search; no layout of {slice_.name} can hold this model; "
                "take a larger slice, or lower batch_size or seq_len."
            ]
        )
    candidates = _best_first(_compiled(run, slice_, found, request))
    best = candidates[0]
    if best["fits"] and slice_.is_tpu:
        overrides = {path: _tuple(v) for path, v in best["overrides"].items()}
        whole = search.applied(run, overrides, slice_)
        best = _record(whole, slice_, overrides, request, full=True)
    return best | {"candidates": candidates}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _compiled(
    run: RunConfig, slice_: Slice, layouts: Sequence[Overrides], request: Request
) -> list[dict[str, Any]]:
    """Returns the plans of `layouts`; an interrupt keeps those that are known."""
    found: list[dict[str, Any]] = []
    workers = max(1, (os.cpu_count() or 2))
    pool = concurrent.futures.ThreadPoolExecutor(workers)

    def one(overrides: Overrides) -> dict[str, Any]:
        whole = search.applied(run, overrides, slice_)
        return _record(whole, slice_, overrides, request, full=False)

    jobs = [pool.submit(one, overrides) for overrides in layouts]
    try:
        for job in concurrent.futures.as_completed(jobs):
            try:
                found.append(job.result())
            except PlanError as err:
                print(f"plan: {err}", file=sys.stderr)
            print(f"\r{len(found)}/{len(jobs)} layouts", end="", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nstopped; this is what is known", file=sys.stderr)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        print(file=sys.stderr)
    return found


def _best_first(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns plans that fit before those that do not, faster before slower."""

    def key(record: dict[str, Any]) -> tuple[bool, float, int]:
        seconds = record["step_time_s"] or float("inf")
        return not record["fits"], seconds, record["hbm_peak_bytes"]

    return sorted(records, key=key)


def _record(
    run: RunConfig,
    slice_: Slice,
    overrides: Overrides,
    request: Request,
    *,
    full: bool,
) -> dict[str, Any]:
    """Returns the plan of one layout, under the names that `--json` promises."""
    said = compiler.compile(run, slice_, full=full) if compiler.knows(slice_) else None
    sizes = _by_compiler(said) if said else _by_hand(run, slice_)
    causal, palm = metrics.flops_per_token(run)
    seconds = sizes["step_time_s"]
    tokens_per_s = run.batch_size * run.seq_len / seconds
    share = tokens_per_s / (slice_.devices * slice_.peak_flops)
    tokens = request.tokens or run.num_steps * run.batch_size * run.seq_len
    bill = cost.of(
        tokens,
        tokens_per_s / slice_.chips,
        slice_.chips,
        slice_.generation,
        **request.prices,
    )
    return {
        "topology": slice_.name,
        "num_chips": slice_.chips,
        "num_slices": slice_.num_slices,
        "fits": sizes["hbm_peak_bytes"] <= slice_.hbm_bytes and sizes.pop("accepted"),
        "hbm_limit_bytes": slice_.hbm_bytes,
        **sizes,
        "flops_per_token": causal,
        "tokens_per_s_per_chip": tokens_per_s / slice_.chips,
        "tokens_per_s": tokens_per_s,
        "mfu": share * causal,
        "mfu_palm": share * palm,
        "error_band": slice_.error_band,
        "tokens": tokens,
        "hours": bill.hours,
        "chip_hours": bill.chip_hours,
        "cost_usd": bill.cost_usd,
        "cost_usd_spot": bill.cost_usd_spot,
        "energy_kwh": bill.energy_kwh,
        "co2e_kg": bill.co2e_kg,
        "constants": [list(row) for row in bill.constants],
        "overrides": overrides,
        "command": _command(request, overrides),
    }


def _by_compiler(said: Report) -> dict[str, Any]:
    step = said.step
    return {
        "source": "compiled" if said.full else "compiled to buffers",
        "accepted": said.fits,
        "parameters": said.parameters,
        "hbm_peak_bytes": said.peak_bytes,
        "hbm_by_class": said.by_class,
        "largest_buffers": [list(each) for each in said.largest[:8]],
        "step_time_s": step.seconds,
        "time_by_class": step.by_class,
        "communication": step.communication,
    }


def _by_hand(run: RunConfig, slice_: Slice) -> dict[str, Any]:
    guess = estimate(run, slice_)
    return {
        "source": "worked out by hand, without a compiler",
        "accepted": True,
        "parameters": parameters(run),
        "hbm_peak_bytes": guess.peak_bytes,
        "hbm_by_class": guess.by_class,
        "largest_buffers": [],
        "step_time_s": guess.step_time_s,
        "time_by_class": {"communication": guess.exposed_s},
        "communication": {},
    }


def _command(request: Request, overrides: Overrides) -> str:
    words = ["scaletrain", "train", f"--config={request.spec}", "--workdir=WORKDIR"]
    return " ".join([*words, *search.flags(overrides)])
