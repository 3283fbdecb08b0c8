"""Files and folders that appear complete: written under another name, then renamed."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import BinaryIO

from scaletrain.errors import CheckpointError


def atomic_write(path: pathlib.Path, content: bytes, *, durable: bool = False) -> None:
    """Gives a file new content: all of it or none, whenever the process is killed.

    Args:
      durable: return once it would survive a loss of power.
    """
    with atomic_file(path) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a file to write, which gets the name `path` when the block ends.

    After an error there is no new file, and an old one stays as it was.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def creating(setting: str, target: pathlib.Path, doing: str) -> Iterator[pathlib.Path]:
    """Yields an empty folder, which gets the name `target` when the block ends.

    After an error there is no folder.

    Args:
      setting: that named the target, for the message.
      doing: a word for the name that the folder has until then.

    Raises:
      CheckpointError: something inside could not be written.
    """
    partial = target.parent / f".{target.name}.{doing}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as err:
        raise CheckpointError(
            f"{setting}; it cannot be written: {err}; give another folder."
        ) from err
    finally:
        _remove(partial)


def _remove(folder: pathlib.Path) -> None:
    """Removes a folder that threads may still write to after one of them failed."""
    if folder.exists():
        for pause in (0.1, 0.4, 0.0):  # seconds
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(pause)


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
