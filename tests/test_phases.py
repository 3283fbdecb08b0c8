"""The clock of an attempt, and the watchdog that reads it."""

import subprocess
import sys
import textwrap

from scaletrain.monitor.phase_clock import Phases
from scaletrain.monitor.watchdog import Watchdog
from scaletrain.workdir import Workdir


def test_a_phase_within_another_stops_its_clock():
    times = iter([0.0, 1.0, 3.0, 6.0, 10.0, 15.0])
    phases = Phases(lambda: next(times))
    with phases("step"), phases("save"):  # at 1 and 3, until 6 and 10
        pass
    assert phases.totals() == {"other": 6.0, "step": 6.0, "save": 3.0}
    assert phases.usual("save") is None  # met once


class Watched:
    """A phase that does not end, and a watchdog that looks at it."""

    def __init__(self, folder):
        self.time, self.ends = 0.0, []
        self.phases = Phases(lambda: self.time)
        for _ in range(2):
            self.spend("step", 10)
        self.watchdog = Watchdog(
            self.phases,
            Workdir(folder),
            1000.0,
            100.0,
            self.ends.append,
            lambda: self.time,
        )

    def spend(self, name, seconds):
        """Has a phase of so many seconds."""
        with self.phases(name):
            self.time += seconds

    def look(self, seconds):
        """Looks once a second for so long."""
        for _ in range(seconds):
            self.time += 1.0
            self.watchdog.look()


def test_what_is_slow_is_told_and_what_hangs_is_ended(tmp_path, capsys):
    watched = Watched(tmp_path)
    with watched.phases("step"):
        watched.look(199)
        assert not list(tmp_path.iterdir())
        watched.phases.totals()  # asking does not begin it anew
        watched.look(2)
        assert "step takes 200 s already" in capsys.readouterr().err
        watched.look(199)
        assert watched.ends == []
        watched.look(1)
        assert watched.ends == [75]
    assert len(list(tmp_path.iterdir())) == 1


def test_a_pause_is_no_hang(tmp_path):
    """Of the machine, or of this process: nothing in it ran meanwhile."""
    watched = Watched(tmp_path)
    with watched.phases("step"):
        for _ in range(50):
            watched.time += 10_000.0
            watched.look(1)
        assert not list(tmp_path.iterdir())
        watched.look(400)
    assert watched.ends


def test_a_hang_leaves_stacks_and_ends_with_75(tmp_path):
    """A process whose third step sleeps, with the file's own names in the stacks."""
    code = f"""
        import time
        from scaletrain.monitor.phase_clock import Phases
        from scaletrain.monitor.watchdog import Watchdog
        from scaletrain.workdir import Workdir

        def hangs():
            time.sleep(60)

        phases = Phases()
        with Watchdog(phases, Workdir.of({str(tmp_path)!r}), 100.0, floor_s=0.3):
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
