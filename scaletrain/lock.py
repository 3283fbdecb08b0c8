"""The lock on a workdir: one run at a time trains there."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from scaletrain.errors import CheckpointError
from scaletrain.workdir import Workdir

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def locked(workdir: Workdir, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other runs out of a workdir; readers do not ask.

    The kernel lets go when the process dies, however it does. Where a network file
    system does not carry locks between hosts, two hosts are not kept apart; one that
    has no locks at all is told of.

    Raises:
      CheckpointError: another run is in it, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Without a buffer nothing is left to be written when it closes.
            file = stack.enter_context(workdir.lock.open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise CheckpointError(
                f"--workdir={workdir}; {_holder(workdir.lock)} trains there; wait for "
                "it, end it, or give another folder."
            ) from err
        except OSError as err:
            if err.errno not in _NO_LOCKS:
                raise CheckpointError(
                    f"--workdir={workdir}; {err.strerror}; give a folder you may "
                    "write to."
                ) from err
            say(
                f"--workdir={workdir}; its file system has no locks ({err.strerror}), "
                "so a second run would not be refused; start none there."
            )
        else:
            with contextlib.suppress(OSError):  # the lock holds on a full disk too
                file.truncate(0)
                file.write(json.dumps(_self()).encode())
        yield


def _self() -> dict[str, Any]:
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(lock: pathlib.Path) -> str:
    try:
        said = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
