"""Money, energy and carbon of a run, from tables that name their sources.

Prices and powers change and are often estimates: each row says which, and each can be
overridden. Nothing here is measured.
"""

import dataclasses
import math
from typing import NamedTuple

from scaletrain.errors import ConfigError


class Figure(NamedTuple):
    """A number with where it comes from."""

    value: float
    source: str


class Rates(NamedTuple):
    """What an hour of one chip takes."""

    dollars: Figure  # on demand
    spot: Figure | None  # preemptible; None where no list price is known
    watts: Figure  # of the chip under load
    host_watts: Figure  # its share of the host, network and cooling fans


_GOOGLE = "Google Cloud's price list, {}, as in SkyPilot's catalog v8, read 2026-11"
_EAST = _GOOGLE.format("us-east5")
_OKLAHOMA = _GOOGLE.format("us-central2")
_AMAZON = "AWS list price, N. Virginia, 2026-07: {} at ${} an hour / 8"
_TPU_HOST = Figure(60.0, "estimate: a 240 W host share for 4 chips")
_GPU_HOST = Figure(575.0, "estimate: DGX H100 10.2 kW less 8 x 700 W, a GPU")
RATES = {
    "v4": Rates(
        Figure(3.22, _OKLAHOMA),
        Figure(0.92, _OKLAHOMA),
        Figure(192.0, "arXiv 2304.01433 table 4: 192 W mean under load"),
        _TPU_HOST,
    ),
    "v5e": Rates(
        Figure(1.20, _EAST),
        Figure(0.60, _EAST),
        Figure(170.0, "estimate: no figure is published; half of v5p, by peak and die"),
        _TPU_HOST,
    ),
    "v5p": Rates(
        Figure(4.20, _EAST),
        Figure(1.68, _EAST),
        Figure(350.0, "estimate: no figure is published; v4 scaled by peak FLOP/s"),
        _TPU_HOST,
    ),
    "v6e": Rates(
        Figure(2.70, _EAST),
        Figure(1.22, _EAST),
        Figure(300.0, "estimate: v5e x 4.7 the peak / 67% better energy efficiency"),
        _TPU_HOST,
    ),
    "tpu7x": Rates(
        Figure(12.0, "estimate: no list price is known to this table, 2025"),
        None,
        Figure(960.0, "estimate: about 10 MW for a 9,216-chip pod, as announced, less"
                      " hosts, 2025"),
        _TPU_HOST,
    ),
    "a100": Rates(
        Figure(3.40, "estimate: on demand at a large cloud, 2025"), None,
        Figure(400.0, "vendor's data sheet: TDP of the SXM4 module"),
        Figure(412.0, "estimate: DGX A100 6.5 kW less 8 x 400 W, a GPU"),
    ),
    "h100": Rates(
        Figure(6.88, _AMAZON.format("p5.48xlarge", "55.04")),
        Figure(2.50, "estimate: spot at a large cloud, 2025"),
        Figure(685.0, "measured: 685 W of 700 W under bf16 matmuls, 2026-11-23"),
        _GPU_HOST,
    ),
    "h200": Rates(
        Figure(7.91, _AMAZON.format("p5en.48xlarge", "63.30")), None,
        Figure(700.0, "vendor's data sheet: TDP of the SXM module"), _GPU_HOST,
    ),
    "b200": Rates(
        Figure(14.24, _AMAZON.format("p6-b200.48xlarge", "113.93")), None,
        Figure(1000.0, "vendor's data sheet: TDP of the SXM module"), _GPU_HOST,
    ),
}  # fmt: skip
PUE = Figure(1.10, "Google environmental report: 1.10 over all its sites, 2023")
# Grams of CO2 equivalent a kWh of the grid, a year's mean.
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
    cost_usd: float
    cost_usd_spot: float | None
    energy_kwh: float  # chips, hosts and what the site adds
    co2e_kg: float
    constants: tuple[tuple[str, float, str, str], ...]  # name, value, unit, source


def of(
    tokens: float,
    tokens_per_s_per_chip: float,
    num_chips: int,
    generation: str,
    *,
    region: str | None = None,
    price_per_chip_hour: float | None = None,
    watts_per_chip: float | None = None,
    pue: float | None = None,
    grid_g_per_kwh: float | None = None,
) -> Cost:
    """Returns the cost of training on `tokens`, at this speed without a stop.

    Args:
      watts_per_chip: the chip with its share of the host.

    Raises:
      ConfigError: an unknown region, or a number that makes no sense.
    """
    check(region, price_per_chip_hour, watts_per_chip, pue, grid_g_per_kwh)
    rates, given = RATES[generation], "given on the command line"

    def chosen(value: float | None, figure: Figure) -> Figure:
        return figure if value is None else Figure(value, given)

    dollars = chosen(price_per_chip_hour, rates.dollars)
    both = rates.watts.value + rates.host_watts.value
    watts = chosen(
        watts_per_chip,
        Figure(both, f"chip: {rates.watts.source}; host: {rates.host_watts.source}"),
    )
    site = chosen(pue, PUE)
    grid = chosen(grid_g_per_kwh, GRID[region or "world"])
    hours = tokens / tokens_per_s_per_chip / num_chips / 3600
    chip_hours = hours * num_chips
    energy_kwh = chip_hours * watts.value * site.value / 1000
    spot = rates.spot if price_per_chip_hour is None else None
    constants = [
        ("price", *dollars[:1], "$/chip-hour", dollars.source),
        ("power", *watts[:1], "W/chip", watts.source),
        ("PUE", *site[:1], "", site.source),
        ("grid", *grid[:1], "g CO2e/kWh", f"{region or 'world'}: {grid.source}"),
    ]
    if spot:
        constants.insert(1, ("spot price", spot.value, "$/chip-hour", spot.source))
    return Cost(
        hours=hours,
        chip_hours=chip_hours,
        cost_usd=chip_hours * dollars.value,
        cost_usd_spot=chip_hours * spot.value if spot else None,
        energy_kwh=energy_kwh,
        co2e_kg=energy_kwh * grid.value / 1000,
        constants=tuple(constants),
    )


def check(
    region: str | None,
    price_per_chip_hour: float | None,
    watts_per_chip: float | None,
    pue: float | None,
    grid_g_per_kwh: float | None,
) -> None:
    """Raises ConfigError with everything that is wrong with the overrides."""
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
