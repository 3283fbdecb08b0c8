"""Requests to stop: the first signal is one, the second ends the process.

Handlers are installed before anything slow begins, jax's import among it, so that a
signal is never met by the default. Who runs the loop asks between steps; everything
before the first step asks at its safe points (`at_safe_point`), where nothing is lost.
"""

import signal
import sys
import time
from types import FrameType

from scaletrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_caught: list[tuple[int, float]] = []  # process-wide, as signals are


def catch() -> None:
    """Makes the first signal a request."""
    _caught.clear()
    for number in SIGNALS:
        signal.signal(number, _request)


def _request(number: int, frame: FrameType | None) -> None:
    del frame
    _caught.append((number, time.monotonic()))
    name = signal.Signals(number).name
    print(
        f"{name}: stopping at the next step; a second signal stops at once",
        file=sys.stderr,
        flush=True,
    )
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)


def requested() -> bool:
    """Returns whether this process was asked to stop."""
    return bool(_caught)


def waited_s() -> float:
    """Returns the seconds since it was asked."""
    return time.monotonic() - _caught[0][1]


def at_safe_point(what: str) -> None:
    """Raises Interrupted if a stop was requested; nothing is to be saved here."""
    if _caught:
        raise Interrupted(
            f"stopped by a signal {what}; there was nothing to save; "
            "the same command goes on from there."
        )
