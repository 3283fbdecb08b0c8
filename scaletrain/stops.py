"""Requests to stop: the first signal is one, the second ends the process.

Handlers are installed before anything slow begins, jax's import among it, so that a
signal is never met by the default. The loop asks between steps. Before its first step
there is nothing to save: inside `at_once` a signal ends the run where it is.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

from scaletrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class _Requests:
    """What this process was asked; process-wide, as signals are."""

    def __init__(self) -> None:
        self.since: float | None = None  # monotonic seconds of the first
        self.at_once = False
        self.shared = False  # with other processes, by jax's preemption service


_requests = _Requests()


def catch() -> None:
    """Makes the first signal a request."""
    _requests.__init__()
    for number in SIGNALS:
        signal.signal(number, _request)


def share() -> None:
    """Leaves SIGTERM to the preemption service of jax, which agrees on a step."""
    _requests.shared = True


def _request(number: int, frame: FrameType | None) -> None:
    del frame
    if _requests.shared:
        os.kill(os.getpid(), signal.SIGTERM)
        return
    _requests.since = time.monotonic()
    for each in SIGNALS:
        signal.signal(each, signal.SIG_DFL)
    if _requests.at_once:
        raise _interrupted()
    name = signal.Signals(number).name
    print(
        f"{name}: stopping after this step; a second signal stops at once",
        file=sys.stderr,
        flush=True,
    )


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Lets a signal end what happens inside, since there is nothing to save."""
    if _requests.since is not None:
        raise _interrupted()
    _requests.at_once = True
    try:
        yield
    finally:
        _requests.at_once = False


def _interrupted() -> Interrupted:
    return Interrupted(
        "stopped by a signal before the first step; there was nothing to save; "
        "the same command starts again."
    )


def since() -> float | None:
    """Returns when this process was asked to stop, on the monotonic clock."""
    return _requests.since
