"""The folder of a run: made, checked, and held by one run at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import socket
import time
from collections.abc import Iterator

from scaletrain.errors import CheckpointError


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
def held(path: pathlib.Path) -> Iterator[None]:
    """Keeps other runs out of a workdir; readers do not ask.

    The kernel lets go when the process dies, however it does. Where a network file
    system does not carry locks between hosts, two hosts are not kept apart.

    Raises:
      CheckpointError: another run is in it.
    """
    with (path / "lock").open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            file.seek(0)
            raise CheckpointError(
                f"--workdir={path}; {_holder(file.read())} trains there; wait for it, "
                "end it, or give another folder."
            ) from err
        file.seek(0)
        file.truncate()
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": since}
        json.dump(holder, file)
        file.flush()
        yield


def _holder(text: str) -> str:
    try:
        said = json.loads(text)
        return f"process {said['pid']} on {said['host']}, since {said['since']},"
    except (ValueError, KeyError):
        return "another process"
