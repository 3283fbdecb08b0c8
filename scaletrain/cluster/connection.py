"""A TCP connection between two processes of a run: JSON messages, one a line."""

import contextlib
import json
import select
import socket
import threading
import time
from typing import Any

_SEND_S = 5.0  # for the kernel to take a message
_MAX_LINE_BYTES = 2**24  # no message of ours comes near it: a stranger's is cut off

Message = dict[str, Any]


class Connection:
    """This process's end of a connection.

    Args:
      sock: a connected socket, which belongs to this object from now on.
      peer: number of the process at the other end; process 0 learns it from a hello.

    Attributes:
      last_received: when the other end was heard last, in monotonic seconds.
      said_goodbye: the other end announced that it leaves: its silence is no loss.
    """

    def __init__(self, sock: socket.socket, peer: int = 0):
        sock.settimeout(_SEND_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer = peer
        self.last_received = time.monotonic()
        self.said_goodbye = False
        self._socket = sock
        self._incomplete_line = b""
        self._unread: list[Message] = []  # came together with the first one
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """Returns the file descriptor, so that a selector can wait for messages."""
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Sends a message; a failure to send is ignored.

        If the other end is gone, its silence or its closed socket says so soon after.
        """
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Message] | None:
        """Returns the messages that have arrived, None once the connection is over."""
        try:
            data = self._socket.recv(2**16)
            *lines, self._incomplete_line = (self._incomplete_line + data).split(b"\n")
            messages = [json.loads(line) for line in lines]
        except TimeoutError:
            return []
        except (OSError, ValueError):
            return None
        if not data or len(self._incomplete_line) > _MAX_LINE_BYTES:
            return None
        self.last_received = time.monotonic()
        unread, self._unread = self._unread, []
        return unread + messages

    def receive_first(self, deadline: float) -> Message:
        """Returns the first message, an empty one if none arrives in time.

        Args:
          deadline: when to give up, in monotonic seconds.
        """
        while (remaining_s := deadline - time.monotonic()) > 0:
            self._socket.settimeout(min(remaining_s, _SEND_S))
            messages = self.receive()
            if messages is None:
                break
            if messages:
                self._socket.settimeout(_SEND_S)
                self._unread = messages[1:]
                return messages[0]
        return {}

    def is_closed(self) -> bool:
        """Returns whether the other end is gone; drops messages that were unread."""
        readable = select.poll()
        readable.register(self, select.POLLIN)
        with contextlib.suppress(OSError):
            while readable.poll(0):
                if not self._socket.recv(2**16):
                    return True
            return False
        return True

    def close(self) -> None:
        """Ends the connection."""
        self._socket.close()
