"""A few of the kills of `make endurance`."""

import endurance
import pytest


@pytest.mark.slow
def test_a_run_killed_six_times_ends_as_one_in_one_piece():
    """In each phase once, if every moment that is waited for comes."""
    table = endurance.main(["-n", "6"])  # another seed every time; it is printed
    assert table.total() == 6
