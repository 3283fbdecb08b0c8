"""A plan as a person reads it."""

from collections.abc import Iterator
from typing import Any

_GIB = 2**30


def in_words(found: dict[str, Any]) -> str:
    """Returns the text of a plan, its candidates and its slices."""
    lines = [*_head(found), *_memory(found), *_time(found), *_bill(found)]
    for title, key in (
        ("Layouts, best first", "candidates"),
        ("Changes that make it fit", "remedies"),
        ("Slices, best first", "slices"),
    ):
        if found.get(key):
            lines += ["", title, *_table(found[key])]
    if not found["fits"] and not found.get("remedies", True):
        lines += ["", "No single change that was tried makes it fit; try --search."]
    lines += ["", "Run it, on every host of the slice:", f"  {found['command']}"]
    return "\n".join(lines)


def _head(found: dict[str, Any]) -> Iterator[str]:
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    slices = f" x {found['num_slices']} slices" if found["num_slices"] > 1 else ""
    yield (
        f"{found['parameters']:,} parameters on {found['topology']}{slices}, "
        f"{found['num_chips']} chips ({found['source']}): {verdict}"
    )


def _memory(found: dict[str, Any]) -> Iterator[str]:
    peak, limit = found["hbm_peak_bytes"], found["hbm_limit_bytes"]
    yield ""
    yield (
        f"Memory of a device: {peak / _GIB:.2f} GiB of {limit / _GIB:.2f} GiB, "
        f"{(limit - peak) / _GIB:.2f} GiB to spare"
    )
    for name, size in found["hbm_by_class"].items():
        yield f"  {name:<28}{size / _GIB:9.2f} GiB"
    if not found["fits"]:
        yield "  largest buffers:"
        for size, what in found["largest_buffers"]:
            yield f"  {size / _GIB:9.2f} GiB  {what}"


def _time(found: dict[str, Any]) -> Iterator[str]:
    yield ""
    yield (
        f"Step: {found['step_time_s']:.3f} s, {found['error_band']}; "
        f"{found['tokens_per_s_per_chip']:,.0f} tokens/s a chip, "
        f"{found['tokens_per_s']:,.0f} in all; "
        f"MFU {found['mfu']:.1%}, PaLM's {found['mfu_palm']:.1%}"
    )
    for name, seconds in found["time_by_class"].items():
        yield f"  {name:<28}{seconds:9.3f} s"
    for axis, sums in found["communication"].items():
        yield (
            f"  over {axis:<23}{sums['bytes'] / _GIB:9.2f} GiB, "
            f"{sums['wire_s']:.3f} s on the wire, {sums['exposed_s']:.3f} s exposed, "
            f"{sums['count']:,} collectives"
        )


def _bill(found: dict[str, Any]) -> Iterator[str]:
    spot = found["cost_usd_spot"]
    yield ""
    yield (
        f"{found['tokens']:.3g} tokens: {found['hours']:,.1f} h, "
        f"{found['chip_hours']:,.0f} chip-hours, ${found['cost_usd']:,.0f}"
        + (f" (spot ${spot:,.0f})" if spot is not None else "")
        + f", {found['energy_kwh']:,.0f} kWh, {found['co2e_kg']:,.0f} kg CO2e"
    )
    for name, value, unit, source in found["constants"]:
        yield f"  {name:<24}{value:>10} {unit:<16} {source}"


def _table(records: list[dict[str, Any]]) -> Iterator[str]:
    yield "      step s   GiB   tok/s/chip   $        slice and overrides"
    for record in records:
        words = " ".join(f"{k}={v}" for k, v in record["overrides"].items())
        mark = " " if record["fits"] else "x"
        yield (
            f"  {mark} {record['step_time_s']:8.3f} "
            f"{record['hbm_peak_bytes'] / _GIB:6.1f} "
            f"{record['tokens_per_s_per_chip']:10,.0f} {record['cost_usd']:10,.0f}  "
            f"{record['topology']} {words}"
        )
