"""A plan as a record, whose keys are the names that `--json` promises."""

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from scaletrain import config, flops
from scaletrain.config import Overrides, RunConfig
from scaletrain.footprint import cost
from scaletrain.hardware import clouds
from scaletrain.hardware.slices import Slice
from scaletrain.plan.compiler import Report
from scaletrain.plan.estimate import estimate, parameters

Record = dict[str, Any]
BEST = {  # the superlatives of compared slices, and the figure that each minimises
    "fastest": "hours",
    "cheapest": "cost_usd",
    "greenest": "co2e_kg",
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The command line's part in a record: the experiment, and figures of the bill."""

    spec: str = ""  # the experiment, as in --config
    given: tuple[tuple[str, str], ...] = ()  # (path, text) of the user's overrides
    tokens: float = 0.0  # of the training run; 0 = those of num_steps
    prices: dict[str, Any] = dataclasses.field(default_factory=dict)  # see cost.of


def of(
    run: RunConfig,
    slice_: Slice,
    report: Report | None,
    overrides: Overrides,
    wanted: Wanted,
) -> Record:
    """Returns the plan of a run on a slice.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices.
      report: the compiler's; without one the plan rests on the analytic estimate.
      overrides: the planner's changes to the user's settings, which lead to `run`.
      wanted: the experiment, its tokens and its prices.
    """
    sizes = _by_compiler(report) if report else _by_estimate(run, slice_)
    accepted = report is None or report.fits
    causal, palm = flops.flops_per_token(run)
    seconds = sizes["step_time_s"]
    tokens_per_s = run.batch_size * run.seq_len / seconds
    share = tokens_per_s / (slice_.devices * slice_.chip.peak_flops)
    tokens = wanted.tokens or run.num_steps * run.batch_size * run.seq_len
    bill = cost.of(
        tokens,
        tokens_per_s / slice_.chips,
        slice_.chips,
        slice_.chip.rates,
        **wanted.prices,
    )
    return {
        "topology": slice_.name,
        "num_chips": slice_.chips,
        "num_slices": slice_.num_slices,
        "fits": accepted and sizes["hbm_peak_bytes"] <= slice_.chip.hbm_bytes,
        "hbm_limit_bytes": slice_.chip.hbm_bytes,
        **sizes,
        "flops_per_token": causal,
        "tokens_per_s_per_chip": tokens_per_s / slice_.chips,
        "tokens_per_s": tokens_per_s,
        "mfu": share * causal,
        "mfu_palm": share * palm,
        "error_band": slice_.chip.error_band,
        "rates": rates(slice_),
        "tokens": tokens,
        "hours": bill.hours,
        "chip_hours": bill.chip_hours,
        "cost_usd": bill.cost_usd,
        "cost_usd_spot": bill.cost_usd_spot,
        "energy_kwh": bill.energy_kwh,
        "co2e_kg": bill.co2e_kg,
        "constants": [list(row) for row in bill.constants],
        "overrides": overrides,
        "command": launch_command(wanted.spec, wanted.given, overrides, slice_),
    }


def rates(slice_: Slice) -> list[list[Any]]:
    """Returns the rates of a predicted step: [name, value, unit, source] each."""
    chip, across = slice_.chip, ""
    if slice_.num_slices > 1:
        across = "between slices"
    elif not slice_.is_tpu and slice_.hosts > 1:
        across = "between hosts"
    figures = [
        ("bf16 peak", chip.peak_flops, 1e12, "TFLOP/s"),
        ("of it, matmuls", chip.matmul_efficiency, 1, ""),
        ("of it, attention", chip.attention_efficiency, 1, ""),
        ("memory", chip.hbm_bytes_per_s, 1e9, "GB/s"),
        ("of it, element-wise", chip.memory_efficiency, 1, ""),
        ("host", chip.host_bytes_per_s, 1e9, "GB/s"),
        ("link, one way", chip.link_bytes_per_s, 1e9, "GB/s"),
        (across, chip.network_bytes_per_s, 1e9, "GB/s"),
    ]
    return [
        [name, figure / scale, unit, figure.source]
        for name, figure, scale, unit in figures
        if name
    ]


def best_first(records: Sequence[Record]) -> list[Record]:
    """Returns the plans in order: those that fit first, then the fastest first."""

    def key(record: Record) -> tuple[bool, float, int]:
        return not record["fits"], record["step_time_s"], record["hbm_peak_bytes"]

    return sorted(records, key=key)


def compared(records: Sequence[Record]) -> Record:
    """Returns the plans of several slices, and the best slice by each figure of `BEST`.

    Only a plan that fits can be the best; the slice is None where none does.
    """
    fitting = [each for each in records if each["fits"]]
    best = {
        word: min(fitting, key=lambda each: each[name])["topology"] if fitting else None
        for word, name in BEST.items()
    }
    return best | {"slices": best_first(records)}


def pareto_optimal(records: Sequence[Record]) -> list[bool]:
    """Returns for each plan whether it fits and is Pareto-optimal.

    The objectives are time, memory and money.
    """
    figures = [
        (each["hours"], each["hbm_peak_bytes"], each["cost_usd"]) for each in records
    ]

    def dominated(mine: tuple[float, ...]) -> bool:
        return any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True))
            for other in figures
        )

    return [
        each["fits"] and not dominated(mine)
        for each, mine in zip(records, figures, strict=True)
    ]


def launch_command(
    spec: str,
    given: Sequence[tuple[str, str]],
    overrides: Overrides,
    slice_: Slice,
) -> str:
    """Returns the command that starts the run on its devices, quoted for a shell.

    Args:
      spec: the experiment, as in --config.
      given: (path, text) of the user's overrides.
      overrides: of the planner; they replace the user's.
      slice_: the devices.
    """
    kept = [f"--config.{path}={text}" for path, text in given if path not in overrides]
    words = [f"--config={spec}", "--workdir=WORKDIR", *kept, *config.flags(overrides)]
    return shlex.join([*_starter(slice_), *words])


def _starter(slice_: Slice) -> list[str]:
    """Returns the words that start a process on each of the slice's hosts."""
    if tpu := slice_.chip.tpu:
        slices = [f"--num_slices={slice_.num_slices}"] * (slice_.num_slices > 1)
        words = [f"--topology={slice_.name}", *slices]
        if clouds.on_vms(tpu, slice_.shape):
            return ["launch/tpu_vm.sh", *words, "--"]
        pods = ["--image=IMAGE", "--claim=CLAIM"]
        return ["launch/gke/jobset.sh", *words, *pods, "--"]
    if slice_.hosts > 1:
        return ["sbatch", f"--nodes={slice_.hosts}", "launch/slurm.sbatch"]
    return ["scaletrain", "train"]


def _by_compiler(report: Report) -> Record:
    step = report.step
    return {
        "source": "compiled" if report.full else "compiled to buffers",
        "parameters": report.parameters,
        "hbm_peak_bytes": report.peak_bytes,
        "hbm_by_class": report.by_class,
        "host_bytes": report.host_bytes,
        "largest_buffers": [list(each) for each in report.largest[:8]],
        "step_time_s": step.seconds,
        "time_by_class": step.by_class,
        "communication": step.communication,
    }


def _by_estimate(run: RunConfig, slice_: Slice) -> Record:
    guess = estimate(run, slice_)
    return {
        "source": "worked out by hand, without a compiler",
        "parameters": parameters(run),
        "hbm_peak_bytes": guess.peak_bytes,
        "hbm_by_class": guess.by_class,
        "host_bytes": 0,
        "largest_buffers": [],
        "step_time_s": guess.step_time_s,
        "time_by_class": {
            "arithmetic": guess.step_time_s - guess.exposed_s,
            "communication": guess.exposed_s,
        },
        "communication": {},
    }
