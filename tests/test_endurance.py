"""A few of the kills of `make endurance`."""

import endurance


def test_a_run_killed_eight_times_ends_as_one_in_one_piece():
    table = endurance.main(["-n", "8"])  # another seed every time; it is printed
    assert table.total() == 8
