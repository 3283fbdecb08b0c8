"""A plan as a person reads it."""

from collections.abc import Iterator
from typing import Any

from scaletrain.errors import counted
from scaletrain.plan import record, search
from scaletrain.plan.record import Record

_GIB = 2**30


def in_words(found: Record) -> str:
    """Returns the text of a plan, its candidates and its slices."""
    lines = [*_head(found), *_memory(found), *_time(found), *_bill(found)]
    for title, key in (
        ("Layouts, best first", "candidates"),
        ("Changes that make it fit", "remedies"),
        ("Changes that were tried, none enough", "tried"),
        ("Slices, best first", "slices"),
    ):
        if found.get(key):
            lines += ["", f"{title} ({_MARKS}):", *_table(found[key])]
    if found.get("slices") and found["fastest"]:
        lines += ["", *(f"{each}: {found[each]}" for each in record.BEST)]
    if found.get("tried"):
        lines += [
            "",
            "Try --search, a larger slice, or a smaller batch_size or seq_len.",
        ]
    if found["fits"]:
        lines += ["", "Run it:", f"  {found['command']}"]
    else:
        remedy = "; take one of the changes above" if found.get("remedies") else ""
        lines += ["", f"It DOES NOT FIT as it is{remedy}. There is nothing to run."]
    return "\n".join(lines)


def _head(found: Record) -> Iterator[str]:
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    slices = f" x {found['num_slices']} slices" if found["num_slices"] > 1 else ""
    yield (
        f"{found['parameters']:,} parameters on {found['topology']}{slices}, "
        f"{counted(found['num_chips'], 'chip')} ({found['source']}): {verdict}"
    )


def _memory(found: Record) -> Iterator[str]:
    peak, limit = found["hbm_peak_bytes"], found["hbm_limit_bytes"]
    room = f"{(limit - peak) / _GIB:.2f} GiB to spare"
    if peak > limit:
        room = f"{(peak - limit) / _GIB:.2f} GiB too much"
    yield ""
    yield (
        f"Memory of a device: {peak / _GIB:.2f} GiB of {limit / _GIB:.2f} GiB, {room}"
    )
    for name, size in found["hbm_by_class"].items():
        yield f"  {name.replace('_', ' '):<28}{size / _GIB:9.2f} GiB"
    if found["host_bytes"]:
        yield f"  beside it, on the host      {found['host_bytes'] / _GIB:9.2f} GiB"
    if not found["fits"] and found["largest_buffers"]:
        yield "  largest buffers:"
        for size, what in found["largest_buffers"]:
            yield f"  {size / _GIB:9.2f} GiB  {what}"


def _time(found: Record) -> Iterator[str]:
    yield ""
    yield (
        f"Step: {found['step_time_s']:.3f} s, {found['error_band']}; "
        f"{found['tokens_per_s_per_chip']:,.0f} tokens/s a chip, "
        f"{found['tokens_per_s']:,.0f} in all; "
        f"MFU {found['mfu']:.1%}, PaLM's {found['mfu_palm']:.1%}"
    )
    whole = found["step_time_s"]
    for name, seconds in found["time_by_class"].items():
        words = "communication, exposed" if name == "communication" else name
        if seconds:
            yield (
                f"  {words.replace('_', ' '):<28}{seconds:9.3f} s "
                f"{seconds / whole:6.1%}"
            )
    for axis, sums in found["communication"].items():
        yield (
            f"  over {axis:<23}{sums['bytes'] / _GIB:9.2f} GiB in "
            f"{sums['count']:,} collectives, {sums['wire_s']:.3f} s on the wire, "
            f"{sums['exposed_s']:.3f} s exposed"
        )
    yield from _sources(found["rates"])


def _bill(found: Record) -> Iterator[str]:
    spot = found["cost_usd_spot"]
    yield ""
    yield (
        f"{found['tokens']:.4g} tokens: {found['hours']:,.1f} h, "
        f"{found['chip_hours']:,.0f} chip-hours, ${found['cost_usd']:,.0f}"
        + (f" (spot ${spot:,.0f})" if spot is not None else "")
        + f", {found['energy_kwh']:,.0f} kWh, {found['co2e_kg']:,.0f} kg CO2e"
    )
    yield from _sources(found["constants"])


def _sources(rows: list[list[Any]]) -> Iterator[str]:
    for name, value, unit, source in rows:
        yield f"  {name:<24}{value:>10.5g} {unit:<16} {source}"


_MARKS = "x does not fit, * none is better in time, memory and money at once"


def _table(records: list[Record]) -> Iterator[str]:
    yield (
        f"    {'step s':>8}{'GiB':>8}{'tokens/s/chip':>15}{'$':>13}{'kg CO2e':>13}"
        "  slice and overrides"
    )
    for each, best in zip(records, record.unbeaten(records), strict=True):
        mark = "*" if best else " " if each["fits"] else "x"
        yield (
            f"  {mark} {each['step_time_s']:8.3f}{each['hbm_peak_bytes'] / _GIB:8.1f}"
            f"{each['tokens_per_s_per_chip']:15,.0f}{each['cost_usd']:13,.0f}"
            f"{each['co2e_kg']:13,.0f}  {each['topology']} "
            + (_changed(each) or "(as given)")
        )


def _changed(each: Record) -> str:
    """Returns the overrides of a plan without the part that all have."""
    words = search.flags(each["overrides"])
    return " ".join(word.removeprefix("--config.") for word in words)
