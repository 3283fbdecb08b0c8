"""The clock of an attempt, and the watchdog that reads it."""

import subprocess
import sys
import textwrap

from scaletrain.phases import Phases


def test_a_phase_within_another_stops_its_clock():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    phases = Phases(lambda: next(times))
    with phases("step"), phases("save"):  # at 1 and 3, until 6 and 10
        pass
    assert phases.totals() == {"other": 6.0, "step": 6.0, "save": 3.0}
    assert phases.usual("save") is None  # met once


def test_a_hang_leaves_stacks_and_ends_with_75(tmp_path):
    """A process whose third step sleeps, with the file's own names in the stacks."""
    code = f"""
        import pathlib, time
        from scaletrain.phases import Phases
        from scaletrain.watchdog import Watchdog

        def hangs():
            time.sleep(60)

        phases = Phases()
        Watchdog(phases, pathlib.Path({str(tmp_path)!r}), 100.0, floor_s=0.3)
        for seconds in (0.001, 0.001):
            with phases("step"):
                time.sleep(seconds)
        with phases("step"):
            hangs()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 75, done.stderr
    assert "step has not ended for" in done.stderr
    (stacks,) = tmp_path.glob("stacks-0-*.txt")
    assert "in hangs" in stacks.read_text()
