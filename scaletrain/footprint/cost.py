"""Money, energy and carbon of a run, from figures that name their sources.

Prices and powers change and are often estimates; the source of a figure says so, and
the command line can replace each of them. Nothing in this file is measured.
"""

import dataclasses
import math

from scaletrain.errors import ConfigError
from scaletrain.hardware.chip import Figure, Rates

PUE = Figure(1.10, "Google environmental report: 1.10 over all its sites, 2023")
# Grams of CO2 equivalent per kWh of the power grid, the mean of a year.
_GRID = "Google Cloud, region-carbon-info: location-based mean of 2025"
GRID = {
    "world": Figure(481.0, "estimate: Ember, Global Electricity Review, mean of 2023"),
    "us-central1": Figure(431.95, _GRID),
    "us-central2": Figure(417.39, _GRID),
    "us-east1": Figure(579.44, _GRID),
    "us-east4": Figure(343.48, _GRID),
    "us-east5": Figure(343.48, _GRID),
    "us-south1": Figure(299.13, _GRID),
    "us-west1": Figure(97.85, _GRID),
    "us-west4": Figure(360.0, _GRID),
    "europe-west1": Figure(126.43, _GRID),
    "europe-west4": Figure(194.35, _GRID),
    "europe-north1": Figure(29.84, _GRID),
    "asia-northeast1": Figure(449.23, _GRID),
    "asia-southeast1": Figure(365.66, _GRID),
}


@dataclasses.dataclass(frozen=True)
class Cost:
    """The bill of a run."""

    hours: float
    chip_hours: float
    cost_usd: float  # on demand
    cost_usd_spot: float | None  # None where no spot price is known
    energy_kwh: float  # of chips, hosts and the site's overhead
    co2e_kg: float
    constants: tuple[tuple[str, float, str, str], ...]  # name, value, unit, source


def of(
    tokens: float,
    tokens_per_s_per_chip: float,
    num_chips: int,
    rates: Rates,
    *,
    region: str | None = None,
    price_per_chip_hour: float | None = None,
    watts_per_chip: float | None = None,
    pue: float | None = None,
    grid_g_per_kwh: float | None = None,
) -> Cost:
    """Returns the cost of training at a constant speed, without interruptions.

    Args:
      tokens: of the training run.
      tokens_per_s_per_chip: the speed.
      num_chips: of the run.
      rates: of the chip; the arguments below replace figures of it, PUE or GRID.
      region: the grid, a key of GRID; None is the world's mean.
      price_per_chip_hour: US dollars.
      watts_per_chip: of the chip and its share of the host.
      pue: energy of the site / energy of the machines.
      grid_g_per_kwh: grams of CO2 equivalent.

    Raises:
      ConfigError: an unknown region, or a number that makes no sense.
    """
    check(region, price_per_chip_hour, watts_per_chip, pue, grid_g_per_kwh)

    def chosen(value: float | None, figure: Figure) -> Figure:
        return figure if value is None else Figure(value, "given on the command line")

    dollars = chosen(price_per_chip_hour, rates.dollars)
    sources = f"chip: {rates.watts.source}; host: {rates.host_watts.source}"
    watts = chosen(watts_per_chip, Figure(rates.watts + rates.host_watts, sources))
    site = chosen(pue, PUE)
    grid = chosen(grid_g_per_kwh, GRID[region or "world"])
    hours = tokens / tokens_per_s_per_chip / num_chips / 3600
    chip_hours = hours * num_chips
    energy_kwh = chip_hours * watts * site / 1000
    spot = rates.spot if price_per_chip_hour is None else None
    constants = [
        ("price", dollars, "$/chip-hour", dollars.source),
        ("power", watts, "W/chip", watts.source),
        ("PUE", site, "", site.source),
        ("grid", grid, "g CO2e/kWh", f"{region or 'world'}: {grid.source}"),
    ]
    if spot is not None:
        constants.insert(1, ("spot price", spot, "$/chip-hour", spot.source))
    return Cost(
        hours=hours,
        chip_hours=chip_hours,
        cost_usd=chip_hours * dollars,
        cost_usd_spot=None if spot is None else chip_hours * spot,
        energy_kwh=energy_kwh,
        co2e_kg=energy_kwh * grid / 1000,
        constants=tuple(constants),
    )


def check(
    region: str | None,
    price_per_chip_hour: float | None,
    watts_per_chip: float | None,
    pue: float | None,
    grid_g_per_kwh: float | None,
) -> None:
    """Checks the figures on the command line.

    Args:
      region: the grid, a key of GRID.
      price_per_chip_hour: US dollars, 0 or more.
      watts_per_chip: of the chip and its share of the host, 0 or more.
      pue: energy of the site / energy of the machines, 1 or more.
      grid_g_per_kwh: grams of CO2 equivalent, 0 or more.

    Raises:
      ConfigError: an unknown region, or numbers out of range, all in one error.
    """
    problems = []
    if region is not None and region not in GRID:
        problems.append(f"--region={region}; unknown; pick one of {', '.join(GRID)}.")
    if region is not None and grid_g_per_kwh is not None:
        problems.append(
            f"--region={region}; no effect with --grid_g_per_kwh; give one of the two."
        )
    for name, value, least in (
        ("price_per_chip_hour", price_per_chip_hour, 0.0),
        ("watts_per_chip", watts_per_chip, 0.0),
        ("pue", pue, 1.0),
        ("grid_g_per_kwh", grid_g_per_kwh, 0.0),
    ):
        if value is None or least <= value < math.inf:
            continue
        why = f"below {least}" if value < least else "not a finite number"
        problems.append(f"--{name}={value}; {why}; give {least} or more.")
    if problems:
        raise ConfigError(problems)
