"""The watchdog of a process: on a hang it writes all stacks, then exits with code 75.

A phase hangs when it takes many times its usual time. A phase without a usual time has
a fixed limit, since the time of a compilation or a first read is not known beforehand.
Time in which the process did not run, on a paused machine, is no part of a phase.
"""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Self

import jax

from scaletrain.errors import Interrupted
from scaletrain.monitor.phase_clock import Phases
from scaletrain.workdir import Workdir

FACTOR = 20.0  # times the usual time of a phase
FLOOR_S = 300.0  # below which no phase is called slow: disks may stall for minutes
_POLL_S = 1.0


class Watchdog:
    """A thread that checks the phases of a run, inside a `with`.

    Args:
      phases: the clock of the run's phases.
      workdir: where the stacks are written.
      limit_s: seconds after which a phase is slow at the latest; it is ended after
        twice that; 0 = do not watch.
      floor_s: least seconds that a phase is allowed, if `limit_s` is not less.
      end: ends the process with an exit code.
      clock: seconds that never go back.
    """

    def __init__(
        self,
        phases: Phases,
        workdir: Workdir,
        limit_s: float,
        floor_s: float = FLOOR_S,
        end: Callable[[int], None] = os._exit,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._phases, self._workdir = phases, workdir
        self._limit_s, self._floor_s = limit_s, floor_s
        self._end, self._clock = end, clock
        self._poll_s = min(_POLL_S, floor_s / 4)
        self._over = threading.Event()
        self._looked = clock()
        self._since: float | None = None  # when the watched phase began
        self._seconds, self._warned = 0.0, False  # of the watched phase

    def __enter__(self) -> Self:
        """Starts watching."""
        if self._limit_s:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *why: object) -> None:
        """Stops watching."""
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(self._poll_s):
            self.look()

    def look(self) -> None:
        """Judges the present phase, some `_poll_s` after the last look."""
        name, since = self._phases.now()
        now = self._clock()
        if since != self._since:
            self._since, self._seconds, self._warned = since, 0.0, False
        # A longer gap means that the process was stopped, or its machine paused.
        self._seconds += min(now - max(self._looked, since), 2 * self._poll_s)
        self._looked = now
        allowed = self.allowed(name)
        if self._seconds >= allowed and not self._warned:
            self._warned = True
            self._say(
                f"{name} takes {self._seconds:.0f} s already; the stacks of all "
                f"threads are in {self._dump()}"
            )
        elif self._seconds > 2 * allowed:
            self._say(
                f"{name} has not ended for {self._seconds:.0f} s; this process ends, "
                "to be started again"
            )
            self._end(Interrupted.exit_code)

    def allowed(self, name: str) -> float:
        """Returns the seconds after which a phase is slow; it ends after twice that."""
        usual = self._phases.usual(name)
        if usual is None:
            return self._limit_s
        return min(self._limit_s, max(self._floor_s, FACTOR * usual))

    def _dump(self) -> str:
        """Returns the path of the written stacks, or why there is no file."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self._workdir.stacks(jax.process_index(), stamp)
        try:
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as err:
            return f"no file ({path}; {err.strerror})"
        return str(path)

    def _say(self, words: str) -> None:
        print(f"process {jax.process_index()}: {words}", file=sys.stderr, flush=True)
