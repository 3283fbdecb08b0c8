"""Scalars as TensorBoard reads them: a file of framed protocol buffers.

Events are written in the caller's thread. tensorboardX's own writer has a thread behind
a queue of ten; if the disk fails the thread ends, and the eleventh event then blocks
for ever.
"""

import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Mapping

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore
from tensorboardX.record_writer import masked_crc32c

_opened = itertools.count()  # keeps the names of two files of one second apart


class Board:
    """An event file of a workdir; every method may raise OSError."""

    def __init__(self, workdir: pathlib.Path, start_step: int):
        """Begins the file; TensorBoard drops older events after `start_step`."""
        name = (
            f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
            f".{os.getpid()}.{next(_opened)}"
        )
        self._file = (workdir / name).open("wb")
        self._add(Event(file_version="brain.Event:2"))
        again = SessionLog(status=SessionLog.START)
        self._add(Event(step=start_step + 1, session_log=again))

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Adds the scalars of a step."""
        values = [Summary.Value(tag=n, simple_value=v) for n, v in scalars.items()]
        self._add(Event(step=step, summary=Summary(value=values)))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        self._file.write(length + _checksum(length) + data + _checksum(data))
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
