"""The folder of a run: made, checked, and held by one run at a time."""

import contextlib
import errno
import fcntl
import json
import os
import pathlib
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from scaletrain.errors import CheckpointError

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP)


def prepare(workdir: str) -> pathlib.Path:
    """Returns the workdir, made if missing.

    Raises:
      CheckpointError: it cannot be made or written.
    """
    path = pathlib.Path(workdir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise CheckpointError(
            f"--workdir={workdir}; {err.strerror}; give a folder that can be made."
        ) from err
    if not os.access(path, os.W_OK):
        raise CheckpointError(
            f"--workdir={workdir}; not writable; give a folder you may write to."
        )
    return path


@contextlib.contextmanager
def writing(path: pathlib.Path) -> Iterator[None]:
    """Tells of a disk that refuses what a run cannot begin without.

    Raises:
      CheckpointError: something inside could not be written.
    """
    try:
        yield
    except OSError as err:
        raise CheckpointError(
            f"--workdir={path}; {err.strerror}; make room, or give a folder on another "
            "disk."
        ) from err


def rewrite(path: pathlib.Path, content: bytes) -> None:
    """Gives a file new content: all of it or none, whenever the process is killed."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(content)
    partial.replace(path)


def check_room(setting: str, folder: pathlib.Path, nbytes: int) -> None:
    """Refuses to begin what would fill the disk that `folder` is or will be on.

    Raises:
      CheckpointError: it has less than `nbytes`; `setting` is what the user gave.
    """
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < nbytes:
        raise CheckpointError(
            f"{setting}; {nbytes:,} bytes are to be written there and {free:,} are "
            "free; make room, or give a folder on another disk."
        )


@contextlib.contextmanager
def held(path: pathlib.Path, say: Callable[[str], None]) -> Iterator[None]:
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
            file = stack.enter_context((path / "lock").open("a+b", buffering=0))
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise CheckpointError(
                f"--workdir={path}; {_holder(path / 'lock')} trains there; wait for "
                "it, end it, or give another folder."
            ) from err
        except OSError as err:
            if err.errno not in _NO_LOCKS:
                raise CheckpointError(
                    f"--workdir={path}; {err.strerror}; give a folder you may write to."
                ) from err
            say(
                f"--workdir={path}; its file system has no locks ({err.strerror}), so "
                "a second run would not be refused; start none there."
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
