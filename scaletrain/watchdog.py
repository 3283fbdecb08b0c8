"""Ends a process that hangs: stacks of all threads first, then exit code 75.

A phase hangs when it takes many times what it usually does. One that was never met has
a fixed limit, since nobody knows yet how long a compilation or a first read takes.
"""

import faulthandler
import os
import pathlib
import sys
import threading
import time

import jax

from scaletrain.errors import Interrupted
from scaletrain.phases import Phases

FACTOR = 20.0  # times the usual time of a phase
FLOOR_S = 60.0  # below which no phase is called slow
_POLL_S = 1.0


class Watchdog:
    """A thread that looks at the phases of a run.

    Args:
      limit_s: seconds after which a phase without a usual time hangs, and at most for
        one that has; 0 = do not watch.
      floor_s: a phase is given this long whatever its usual time.
    """

    def __init__(
        self,
        phases: Phases,
        workdir: pathlib.Path,
        limit_s: float,
        floor_s: float = FLOOR_S,
    ):
        self._phases, self._workdir = phases, workdir
        self._limit_s, self._floor_s = limit_s, floor_s
        self._over = threading.Event()
        self._warned: tuple[str, float] | None = None
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if limit_s:
            self._thread.start()

    def close(self) -> None:
        """Stops watching."""
        self._over.set()

    def _watch(self) -> None:
        poll_s = min(_POLL_S, self._floor_s / 4)
        while not self._over.wait(poll_s):
            name, seconds = self._phases.now()
            allowed = self.allowed(name)
            if seconds < allowed:
                self._warned = None
            elif self._warned is None:
                self._warned = name, seconds
                self._say(
                    f"{name} takes {seconds:.0f} s already; the stacks of all threads "
                    f"are in {self._dump()}"
                )
            elif seconds > 2 * allowed:
                self._say(
                    f"{name} has not ended for {seconds:.0f} s; this process ends, to "
                    "be started again"
                )
                os._exit(Interrupted.exit_code)

    def allowed(self, name: str) -> float:
        """Returns the seconds after which a phase is slow; it ends after twice that."""
        usual = self._phases.usual(name)
        if usual is None:
            return self._limit_s
        return min(self._limit_s, max(self._floor_s, FACTOR * usual))

    def _dump(self) -> str:
        """Returns where the stacks are; a disk that fails must not end the watch."""
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = self._workdir / f"stacks-{jax.process_index()}-{stamp}.txt"
        try:
            with path.open("w", encoding="utf-8") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as err:
            return f"no file ({path}; {err.strerror})"
        return str(path)

    def _say(self, words: str) -> None:
        print(f"process {jax.process_index()}: {words}", file=sys.stderr, flush=True)
