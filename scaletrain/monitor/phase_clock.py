"""The phases of a run: the present one, its start, and the seconds of each so far.

One clock serves all its readers: goodput adds up the phases, the watchdog compares the
present phase with earlier ones, and `status.json` shows the present phase.
"""

import contextlib
import json
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterator

from scaletrain.files import atomic_write
from scaletrain.workdir import Workdir

STEP, WAIT = "step", "wait"  # too frequent for status.json
_KEPT = 64  # last durations of a phase, for its median


class Phases:
    """The phases of one attempt; a phase within another stops the outer one's clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock  # monotonic: the time of day may jump
        self._lock = threading.Lock()  # the watchdog reads from its own thread
        self._open: list[tuple[str, float]] = [("other", 0.0)]  # (name, seconds so far)
        self._since = self._began = clock()
        self._totals: dict[str, float] = {}
        self._past: dict[str, list[float]] = {}
        self._status: pathlib.Path | None = None

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Counts the time inside the `with` as the phase `name`."""
        with self._lock:
            self._tick()
            self._open.append((name, 0.0))
        self._tell(name)
        try:
            yield
        finally:
            with self._lock:
                self._tick()
                ended, seconds = self._open.pop()
                past = self._past.setdefault(ended, [])
                past.append(seconds)
                del past[:-_KEPT]
            self._tell(name)

    def _tick(self) -> None:
        """Gives the time since the last change to the phase that it belongs to."""
        now = self._clock()
        name, seconds = self._open[-1]
        self._open[-1] = name, seconds + now - self._since
        self._totals[name] = self._totals.get(name, 0.0) + now - self._since
        self._since = now

    def now(self) -> tuple[str, float]:
        """Returns the present phase and when it began, or went on, on the clock."""
        with self._lock:
            return self._open[-1][0], self._since

    def usual(self, name: str) -> float | None:
        """Returns the median seconds of the phase; None before it ended twice."""
        with self._lock:
            past = self._past.get(name, [])
            return statistics.median(past) if len(past) > 1 else None

    def totals(self) -> dict[str, float]:
        """Returns the seconds of each phase until now."""
        with self._lock:
            name, totals = self._open[-1][0], dict(self._totals)
            totals[name] = totals.get(name, 0.0) + self._clock() - self._since
            return totals

    def elapsed(self) -> float:
        """Returns the seconds since the attempt began."""
        return self._clock() - self._began

    def tell(self, workdir: Workdir) -> None:
        """Keeps `status.json` of the workdir up to date from here on."""
        self._status = workdir.status
        self._tell("")

    def _tell(self, changed: str) -> None:
        if self._status is None or changed in (STEP, WAIT):
            return
        status = {"phase": self.now()[0], "since": time.time(), "pid": os.getpid()}
        # The status is optional; the recorder warns of a full disk.
        with contextlib.suppress(OSError):
            atomic_write(self._status, json.dumps(status).encode())
