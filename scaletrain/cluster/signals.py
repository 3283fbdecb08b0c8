"""Requests to stop this process: the first signal asks, the second one kills.

Handlers are installed before anything slow begins, jax's import among it, so that no
signal kills a run that could have saved. The loop asks `since()` between steps and
between batches of an evaluation. Before its first step there is nothing to save: inside
`at_once` a signal ends the run immediately.

Python runs its handler once the main thread is back from C. That may take as long as a
compilation, or forever in a collective that hangs. A thread therefore reads signals
from a pipe (`signal.set_wakeup_fd`) and does what the handler cannot.
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
_SIG_DFL = 0  # C's default action: the signal kills the process

_libc = ctypes.CDLL(None)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p
_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


class _Requests:
    """The requests that this process has received."""

    def __init__(self) -> None:
        self.first = threading.Lock()  # acquired by the first signal, never released
        self.since: float | None = None  # monotonic seconds of the first signal
        self.at_once = False
        self.tell_others: Callable[[int], None] = lambda number: None


# Global to the process, as signal handlers are. `catch` replaces it, so that a second
# run in one process, as in tests, begins without a request.
_requests = _Requests()


def catch() -> None:
    """Installs the handlers: from now on the first signal is a request to stop."""
    global _requests
    _requests = _Requests()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    args = (_requests, reader)
    threading.Thread(target=_listen, args=args, name="signals", daemon=True).start()
    for number in SIGNALS:
        signal.signal(number, _handle)


def share() -> None:
    """Passes requests on to jax's preemption service, which tells the other processes.

    The service installed its handler for SIGTERM in place of ours when jax started. We
    take the signal back, and call the service's handler for either signal.
    """
    service = _libc.signal(signal.SIGTERM, _SIG_DFL)
    if service:
        _requests.tell_others = _Handler(service)
    signal.signal(signal.SIGTERM, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    """Python's handler, which runs in the main thread."""
    del frame
    _note(_requests, number)
    if _requests.at_once:
        raise _interrupted()


def _listen(requests: _Requests, reader: int) -> None:
    """Handles the first signal in a thread, in case the main one is inside C."""
    _note(requests, os.read(reader, 1)[0])
    # A thread cannot raise in the main one; it can end the process.
    time.sleep(_UNWIND_S)
    if requests.at_once:
        print(f"scaletrain: {_interrupted()}", file=sys.stderr, flush=True)
        os._exit(Interrupted.exit_code)


def _note(requests: _Requests, number: int) -> None:
    """Records the first signal; from then on the next one kills the process."""
    if not requests.first.acquire(blocking=False):
        return
    requests.since = time.monotonic()
    for each in SIGNALS:
        # C's function, because Python's may be called in the main thread alone.
        _libc.signal(each, _SIG_DFL)
    requests.tell_others(signal.SIGTERM)
    if not requests.at_once:
        print(
            f"{signal.Signals(number).name}: stopping after this step, or this batch "
            "of an evaluation; a second signal stops at once",
            file=sys.stderr,
            flush=True,
        )


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Returns a context that a signal ends at once, because there is nothing to save.

    Raises:
      Interrupted: a signal came inside or before.
    """
    if _requests.since is not None:
        raise _interrupted()
    _requests.at_once = True
    try:
        yield
    except Exception as err:
        # A library may raise an error of its own in place of the handler's.
        if _requests.since is None:
            raise
        raise _interrupted() from err
    finally:
        _requests.at_once = False
    if _requests.since is not None:  # or catch the handler's and go on
        raise _interrupted()


def _interrupted() -> Interrupted:
    return Interrupted(
        "stopped by a signal before the first step; there was nothing to save; "
        "the same command starts again."
    )


def since() -> float | None:
    """Returns when the first signal came, in monotonic seconds; None if none did."""
    return _requests.since
