"""The text of a plan."""

from collections.abc import Iterator
from typing import Any

from scaletrain import config
from scaletrain.errors import counted
from scaletrain.plan import record
from scaletrain.plan.record import Record

_GIB = 2**30


def in_words(plan: Record) -> str:
    """Returns the text of a plan, its candidates and its slices."""
    lines = [*_head(plan), *_memory(plan), *_time(plan), *_bill(plan)]
    for title, key in (
        ("Layouts, best first", "candidates"),
        ("Changes that make it fit", "remedies"),
        ("Changes that were tried, none enough", "tried"),
        ("Slices, best first", "slices"),
    ):
        if plan.get(key):
            lines += ["", f"{title} ({_MARKS}):", *_table(plan[key])]
    if plan.get("slices") and plan["fastest"]:
        lines += ["", *(f"{each}: {plan[each]}" for each in record.BEST)]
    if plan.get("tried"):
        lines += [
            "",
            "Try --search, a larger slice, or a smaller batch_size or seq_len.",
        ]
    if plan["fits"]:
        lines += ["", "Run it:", f"  {plan['command']}"]
    else:
        remedy = "; take one of the changes above" if plan.get("remedies") else ""
        lines += ["", f"It DOES NOT FIT as it is{remedy}. There is nothing to run."]
    return "\n".join(lines)


def _head(plan: Record) -> Iterator[str]:
    verdict = "fits" if plan["fits"] else "DOES NOT FIT"
    slices = f" x {plan['num_slices']} slices" if plan["num_slices"] > 1 else ""
    yield (
        f"{plan['parameters']:,} parameters on {plan['topology']}{slices}, "
        f"{counted(plan['num_chips'], 'chip')} ({plan['source']}): {verdict}"
    )


def _memory(plan: Record) -> Iterator[str]:
    peak, limit = plan["hbm_peak_bytes"], plan["hbm_limit_bytes"]
    room = f"{(limit - peak) / _GIB:.2f} GiB to spare"
    if peak > limit:
        room = f"{(peak - limit) / _GIB:.2f} GiB too much"
    yield ""
    yield (
        f"Memory of a device: {peak / _GIB:.2f} GiB of {limit / _GIB:.2f} GiB, {room}"
    )
    for name, size in plan["hbm_by_class"].items():
        yield f"  {name.replace('_', ' '):<28}{size / _GIB:9.2f} GiB"
    if plan["host_bytes"]:
        yield f"  beside it, on the host      {plan['host_bytes'] / _GIB:9.2f} GiB"
    if not plan["fits"] and plan["largest_buffers"]:
        yield "  largest buffers:"
        for size, description in plan["largest_buffers"]:
            yield f"  {size / _GIB:9.2f} GiB  {description}"


def _time(plan: Record) -> Iterator[str]:
    yield ""
    yield (
        f"Step: {plan['step_time_s']:.3f} s, {plan['error_band']}; "
        f"{plan['tokens_per_s_per_chip']:,.0f} tokens/s a chip, "
        f"{plan['tokens_per_s']:,.0f} in all; "
        f"MFU {plan['mfu']:.1%}, PaLM's {plan['mfu_palm']:.1%}"
    )
    step_time = plan["step_time_s"]
    for name, seconds in plan["time_by_class"].items():
        words = "communication, exposed" if name == "communication" else name
        if seconds:
            yield (
                f"  {words.replace('_', ' '):<28}{seconds:9.3f} s "
                f"{seconds / step_time:6.1%}"
            )
    for axis, sums in plan["communication"].items():
        yield (
            f"  over {axis:<23}{sums['bytes'] / _GIB:9.2f} GiB in "
            f"{sums['count']:,} collectives, {sums['wire_s']:.3f} s on the wire, "
            f"{sums['exposed_s']:.3f} s exposed"
        )
    yield from _sources(plan["rates"])


def _bill(plan: Record) -> Iterator[str]:
    spot = plan["cost_usd_spot"]
    yield ""
    yield (
        f"{plan['tokens']:.4g} tokens: {plan['hours']:,.1f} h, "
        f"{plan['chip_hours']:,.0f} chip-hours, ${plan['cost_usd']:,.0f}"
        + (f" (spot ${spot:,.0f})" if spot is not None else "")
        + f", {plan['energy_kwh']:,.0f} kWh, {plan['co2e_kg']:,.0f} kg CO2e"
    )
    yield from _sources(plan["constants"])


def _sources(rows: list[list[Any]]) -> Iterator[str]:
    for name, value, unit, source in rows:
        yield f"  {name:<24}{value:>10.5g} {unit:<16} {source}"


_MARKS = "x does not fit, * none is better in time, memory and money at once"


def _table(records: list[Record]) -> Iterator[str]:
    yield (
        f"    {'step s':>8}{'GiB':>8}{'tokens/s/chip':>15}{'$':>13}{'kg CO2e':>13}"
        "  slice and overrides"
    )
    for each, best in zip(records, record.pareto_optimal(records), strict=True):
        mark = "*" if best else " " if each["fits"] else "x"
        yield (
            f"  {mark} {each['step_time_s']:8.3f}{each['hbm_peak_bytes'] / _GIB:8.1f}"
            f"{each['tokens_per_s_per_chip']:15,.0f}{each['cost_usd']:13,.0f}"
            f"{each['co2e_kg']:13,.0f}  {each['topology']} "
            + (_changed(each) or "(as given)")
        )


def _changed(each: Record) -> str:
    """Returns the overrides of a plan, without the prefix that all flags have."""
    words = config.flags(each["overrides"])
    return " ".join(word.removeprefix("--config.") for word in words)
