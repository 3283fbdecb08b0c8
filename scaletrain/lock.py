"""The lock of a workdir: only one run at a time trains in it."""

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

# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


@contextlib.contextmanager
def locked(workdir: Workdir, say: Callable[[str], None]) -> Iterator[None]:
    """A context that keeps other runs out of a workdir; readers need no lock.

    The kernel releases the lock when the process dies, for whatever reason. On a
    network file system that does not share locks, runs on two hosts are not kept apart.
    A file system without any locks gets a message.

    Args:
      workdir: the folder to lock.
      say: shows a line to the user.

    Raises:
      CheckpointError: another run trains in the workdir, or it cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            # Unbuffered: on a full disk a buffered write would fail again on closing.
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
                file.write(json.dumps(_this_process()).encode())
        yield


def _this_process() -> dict[str, Any]:
    """Returns the content of a lock file."""
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": since}


def _holder(lock: pathlib.Path) -> str:
    """Returns the name of the process that has the lock, for a message."""
    try:
        holder = json.loads(lock.read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']},"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
