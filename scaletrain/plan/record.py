"""A plan as a record: the names that `--json` promises."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from scaletrain import flops
from scaletrain.config import RunConfig
from scaletrain.footprint import cost
from scaletrain.hardware.slices import Slice
from scaletrain.plan import launch
from scaletrain.plan.compiler import Report
from scaletrain.plan.estimate import estimate, parameters
from scaletrain.plan.search import Overrides

Record = dict[str, Any]
BEST = {  # of slices that are compared: the figure that is to be small
    "fastest": "hours",
    "cheapest": "cost_usd",
    "greenest": "co2e_kg",
}


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a record's bill and its command are made of."""

    spec: str = ""  # the experiment, as it was named
    given: tuple[tuple[str, str], ...] = ()  # overrides it was named with
    tokens: float = 0.0  # 0 = those of num_steps
    prices: dict[str, Any] = dataclasses.field(default_factory=dict)  # see cost.of


def of(
    run: RunConfig,
    slice_: Slice,
    said: Report | None,
    overrides: Overrides,
    wanted: Wanted,
) -> Record:
    """Returns the plan of a resolved run; without a compiler's report by hand.

    Args:
      overrides: what makes `run` of the settings that were given.
    """
    sizes = _by_compiler(said) if said else _by_hand(run, slice_)
    accepted = said is None or said.fits
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
        "command": launch.command(wanted.spec, wanted.given, overrides, slice_),
    }


def rates(slice_: Slice) -> list[list[Any]]:
    """Returns what predicted steps rest on: [name, value, unit, source] each."""
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
    """Returns plans that fit before those that do not, faster before slower."""

    def key(record: Record) -> tuple[bool, float, int]:
        return not record["fits"], record["step_time_s"], record["hbm_peak_bytes"]

    return sorted(records, key=key)


def compared(records: Sequence[Record]) -> Record:
    """Returns the plans of several slices, and which of those that fit is best."""
    fitting = [each for each in records if each["fits"]]
    best = {
        word: min(fitting, key=lambda each: each[name])["topology"] if fitting else None
        for word, name in BEST.items()
    }
    return best | {"slices": best_first(records)}


def unbeaten(records: Sequence[Record]) -> list[bool]:
    """Returns for each plan whether no other is as good in time, memory and money."""
    figures = [
        (each["hours"], each["hbm_peak_bytes"], each["cost_usd"]) for each in records
    ]

    def beaten(mine: tuple[float, ...]) -> bool:
        return any(
            other != mine and all(o <= m for o, m in zip(other, mine, strict=True))
            for other in figures
        )

    return [
        each["fits"] and not beaten(mine)
        for each, mine in zip(records, figures, strict=True)
    ]


def _by_compiler(said: Report) -> Record:
    step = said.step
    return {
        "source": "compiled" if said.full else "compiled to buffers",
        "parameters": said.parameters,
        "hbm_peak_bytes": said.peak_bytes,
        "hbm_by_class": said.by_class,
        "host_bytes": said.host_bytes,
        "largest_buffers": [list(each) for each in said.largest[:8]],
        "step_time_s": step.seconds,
        "time_by_class": step.by_class,
        "communication": step.communication,
    }


def _by_hand(run: RunConfig, slice_: Slice) -> Record:
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
