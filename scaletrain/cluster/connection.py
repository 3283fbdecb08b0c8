"""A connection to another process of the run, over which go messages, one a line."""

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

_SEND_S = 5.0  # for the kernel to take a message
_LONGEST = 2**24  # bytes of a line; no message of ours is near it

Message = dict[str, Any]


class Link:
    """This end of it, the number of the process at the other, and when it was heard."""

    def __init__(self, connection: socket.socket, peer: int = 0):
        connection.settimeout(_SEND_S)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer, self.heard = peer, time.monotonic()
        self.left = False  # it said goodbye
        self._socket, self._rest = connection, b""
        self._early: list[Message] = []
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Returns what a selector waits for."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends, or gives up: that nobody listens shows when nobody answers."""
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Returns the messages that have come, None when no more can."""
        try:
            data = self._socket.recv(2**16)
            *lines, self._rest = (self._rest + data).split(b"\n")
            found = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):
            return None
        if not data or len(self._rest) > _LONGEST:
            return None
        self.heard = time.monotonic()
        early, self._early = self._early, []
        return early + found

    def first(self, deadline: float) -> Message:
        """Returns the first message, an empty one if it does not come in time."""
        while (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(min(left, _SEND_S))
            found = self.receive()
            if found is None:
                break
            if found:
                self._socket.settimeout(_SEND_S)
                self._early = found[1:]
                return found[0]
        return {}

    def closed(self) -> bool:
        """Returns whether the other end is gone; drops what it said last."""
        ready = select.poll()
        ready.register(self, select.POLLIN)
        with contextlib.suppress(OSError):
            while ready.poll(0):
                if not self._socket.recv(2**16):
                    return True
            return False
        return True

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()
