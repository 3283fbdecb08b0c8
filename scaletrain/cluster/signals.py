"""Requests to stop: the first signal is one, the second ends the process.

Handlers are installed before anything slow begins, jax's import among it, so that a
signal is never met by the default. The loop asks between steps and between batches of
an evaluation. Before its first step there is nothing to save: inside `at_once` a signal
ends the run where it is.

Python runs its handler once the main thread is back from C, which may take a whole
compilation, or for ever in a collective that hangs. A thread hears of the signal
without it.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from scaletrain.errors import Interrupted

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_UNWIND_S = 2.0  # for the main thread to end by itself
_DEFAULT = 0  # C's SIG_DFL

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Requests:
    """What this process was asked; process-wide, as signals are."""

    def __init__(self) -> None:
        self.first = threading.Lock()  # taken for good by who hears of it first
        self.since: float | None = None  # monotonic seconds of the first
        self.at_once = False
        self.others: Callable[[int], None] = lambda number: None  # tells them


_requests = _Requests()


def catch() -> None:
    """Makes the first signal a request."""
    global _requests
    _requests = _Requests()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    listening = (_requests, reader)
    threading.Thread(target=_listen, args=listening, name="stops", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _request)


def share() -> None:
    """Lets jax's preemption service, which took SIGTERM for itself, hear of signals."""
    service = _libc.signal(signal.SIGTERM, _DEFAULT)
    if service:
        _requests.others = _Handler(service)
    signal.signal(signal.SIGTERM, _request)


def _request(number: int, frame: FrameType | None) -> None:
    del frame
    _note(_requests, number)
    if _requests.at_once:
        raise _interrupted()


def _listen(requests: _Requests, reader: int) -> None:
    """Does what `_request` does, in a thread, which cannot raise in the main one."""
    _note(requests, os.read(reader, 1)[0])
    time.sleep(_UNWIND_S)
    if requests.at_once:
        print(f"scaletrain: {_interrupted()}", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)


def _note(requests: _Requests, number: int) -> None:
    """Takes the first signal; the next one ends the process, whatever it does then."""
    if not requests.first.acquire(blocking=False):
        return
    requests.since = time.monotonic()
    for each in SIGNALS:
        _libc.signal(each, _DEFAULT)  # Python's own is for the main thread alone
    requests.others(signal.SIGTERM)
    if not requests.at_once:
        print(
            f"{signal.Signals(number).name}: stopping after this step, or this batch "
            "of an evaluation; a second signal stops at once",
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
    except Exception as err:
        # A library may raise an error of its own around what the handler raised.
        if _requests.since is None:
            raise
        raise _interrupted() from err
    finally:
        _requests.at_once = False
    if _requests.since is not None:  # or it went on without a word
        raise _interrupted()


def _interrupted() -> Interrupted:
    return Interrupted(
        "stopped by a signal before the first step; there was nothing to save; "
        "the same command starts again."
    )


def since() -> float | None:
    """Returns when this process was asked to stop, on the monotonic clock."""
    return _requests.since
