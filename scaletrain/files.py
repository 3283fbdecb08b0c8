"""Complete files and folders: written under another name, then renamed."""

import contextlib
import os
import pathlib
import shutil
import time
from collections.abc import Iterator
from typing import BinaryIO

from scaletrain.errors import CheckpointError


def atomic_write(path: pathlib.Path, content: bytes, *, durable: bool = False) -> None:
    """Replaces the content of a file: after a kill it has the old or the new content.

    Args:
      path: the file.
      content: all of its new content.
      durable: return only when the content would survive a loss of power.

    Example:
      >>> import tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "status.json"
      >>> atomic_write(path, b"{}")
      >>> path.read_bytes()
      b'{}'
    """
    with atomic_file(path) as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    if durable:  # the new name is durable only when its folder is
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@contextlib.contextmanager
def atomic_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    """Yields a file to write; it is renamed to `path` at the end of the `with` block.

    After an error there is no new file, and an old one is unchanged.
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
def creating(setting: str, target: pathlib.Path, verb: str) -> Iterator[pathlib.Path]:
    """Yields an empty folder; it is renamed to `target` at the end of the `with` block.

    After an error there is no folder.

    Args:
      setting: `name=value` of the user's setting, for messages.
      target: the final path.
      verb: the end of the temporary name, such as "exporting".

    Raises:
      CheckpointError: a file inside could not be written.
    """
    partial = target.parent / f".{target.name}.{verb}"
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
    """Removes a folder, into which threads of a failed save may still write."""
    if folder.exists():
        for pause in (0.1, 0.4, 0.0):  # seconds
            shutil.rmtree(folder, ignore_errors=True)
            time.sleep(pause)


def check_room(setting: str, folder: pathlib.Path, nbytes: int) -> None:
    """Raises CheckpointError if a disk has too little room.

    Args:
      setting: `name=value` of the user's setting, for the message.
      folder: the folder to write to, which need not exist yet.
      nbytes: the bytes to write.
    """
    existing = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    if free < nbytes:
        raise CheckpointError(
            f"{setting}; {nbytes:,} bytes are to be written there and {free:,} are "
            "free; make room, or give a folder on another disk."
        )
