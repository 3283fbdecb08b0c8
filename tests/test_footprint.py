"""Money, energy and carbon."""

import math

import pytest

from scaletrain.errors import ConfigError
from scaletrain.footprint import cost
from scaletrain.hardware.chips import CHIPS


def test_a_bill_adds_up():
    """10^9 tokens at 1000 tokens/s a chip on 10 chips: 10^5 s, by hand."""
    bill = cost.of(
        1e9, 1000, 10, CHIPS["v5p"].rates, price_per_chip_hour=3.6, watts_per_chip=500,
        pue=1.2, grid_g_per_kwh=100,
    )  # fmt: skip
    assert bill.hours == pytest.approx(1e5 / 3600)
    assert bill.cost_usd == pytest.approx(1e5 / 3600 * 10 * 3.6)
    assert bill.energy_kwh == pytest.approx(1e5 / 3600 * 10 * 0.5 * 1.2)
    assert bill.co2e_kg == pytest.approx(bill.energy_kwh * 0.1)
    given = {name for name, *_, source in bill.constants if "command line" in source}
    assert given == {"price", "power", "PUE", "grid"}


def test_a_bill_takes_the_rates_of_the_chip():
    """One chip-hour of H100s at $6.88 and 685 W beside 575 W, by hand."""
    bill = cost.of(3.6e6, 1000, 10, CHIPS["h100"].rates, region="us-west1")
    assert bill.chip_hours == pytest.approx(1)
    assert bill.cost_usd == pytest.approx(6.88)
    assert bill.cost_usd_spot == pytest.approx(2.50)
    assert bill.energy_kwh == pytest.approx(1.26 * 1.10)
    assert bill.co2e_kg == pytest.approx(1.26 * 1.10 * 0.09785)


def test_figures_of_the_site_have_sources():
    for figure in (*cost.GRID.values(), cost.PUE):
        assert figure > 0
        assert len(figure.source) > 20


def test_figures_that_make_no_sense_are_refused():
    with pytest.raises(ConfigError, match=r"(?s)--region=mars.*--pue=0.5; below 1"):
        cost.check("mars", None, None, 0.5, None)
    odd = {"price_per_chip_hour": math.inf, "watts_per_chip": -1.0, "pue": math.nan}
    words = r"(?s)hour=inf; not a finite .*chip=-1.0; below 0.*pue=nan; not a finite "
    with pytest.raises(ConfigError, match=words):
        cost.check(region=None, grid_g_per_kwh=None, **odd)
