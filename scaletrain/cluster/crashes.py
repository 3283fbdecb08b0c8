"""Delays for the ends of this process that are consequences of another's loss.

The thread of `liveness` names the lost process and ends this one. What the loss breaks
in this process ends it too, often sooner, with words that name nobody. Both delays let
the thread win.
"""

import ctypes
import signal
import sys
import time
import types
from collections.abc import Callable

from scaletrain.cluster.liveness import LOSS_FIRST_S


def delay_aborts() -> None:
    """Makes abort() wait 6 s, in the thread that calls it.

    The client of jax's coordination service calls abort() as soon as process 0 is gone
    ("Terminating process because the JAX distributed service detected fatal errors"),
    and `jax.distributed.initialize` takes no callback in its place. It calls it in a
    thread of C++, in which a handler in Python never runs. C's sleep can be a handler:
    it takes the signal's number, which is 6, for seconds.

    Source: xla/pjrt/distributed/client.h, missed_heartbeat_callback; JAX documentation,
    "Fault Tolerant Distributed JAX".
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def delay_tracebacks(leave: Callable[[int], None]) -> None:
    """Makes an uncaught error wait, then print its traceback and leave with code 1.

    A collective with a lost process raises in this one. Python's own way would print
    that error first, then wait for the others at exit.

    Args:
      leave: ends this process with an exit code.
    """

    def uncaught(
        kind: type[BaseException], err: BaseException, trace: types.TracebackType | None
    ) -> None:
        time.sleep(LOSS_FIRST_S)
        sys.__excepthook__(kind, err, trace)
        leave(1)

    sys.excepthook = uncaught
