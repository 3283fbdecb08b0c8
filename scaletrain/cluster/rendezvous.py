"""How the processes of a run find each other: each connects to process 0.

The messages are described in docs/internals/cluster.md.
"""

import os
import socket
import time
from typing import Any

from scaletrain.cluster.connection import Connection, Message
from scaletrain.cluster.discovery import Membership
from scaletrain.errors import ClusterError, LostError

_HELLO_S = 5.0  # to connect, and for a connection to say who it is
_RETRY_S = 0.5  # between attempts to connect or to listen
_PORT_BUSY_S = 30.0  # for a process 0 that is still ending to free its port
_LOOPBACK = ("127.0.0.1", "localhost")


def connect(
    membership: Membership, timeout_s: float
) -> tuple[list[str], list[Connection]]:
    """Returns the names of all processes, in order, and this one's connections.

    Process 0 has a connection to each of the others, which have one to it. A name is
    a host and a process id, as messages to users show it: "node1 (pid 7)".

    Args:
      membership: of this process.
      timeout_s: seconds for all processes to come.

    Raises:
      ClusterError: two processes claim one number, or differ in how many there are.
      LostError: not all came in time; it names who did not.
    """
    host, _, port = membership.coordinator.rpartition(":")
    address = host.strip("[]"), int(port)
    if membership.process_id:
        return _call(membership, address, timeout_s)
    return _Reception(membership).await_all(address, timeout_s)


class _Reception:
    """Process 0 while the others come to it."""

    def __init__(self, membership: Membership):
        self.membership = membership
        self.names = {0: _own_name()}
        self.connections: dict[int, Connection] = {}

    def await_all(
        self, address: tuple[str, int], timeout_s: float
    ) -> tuple[list[str], list[Connection]]:
        """Returns all names and the connections to the others, see `connect`."""
        deadline = time.monotonic() + timeout_s
        num_processes = self.membership.num_processes
        with _listener(self.membership, address) as listener:
            while len(self.names) < num_processes:
                listener.settimeout(max(deadline - time.monotonic(), 0.01))
                try:
                    connection = Connection(listener.accept()[0])
                except TimeoutError:
                    raise self._missing(timeout_s) from None
                self._admit(connection)
        names = [self.names[i] for i in range(num_processes)]
        for connection in self.connections.values():
            connection.send({"names": names})
        return names, list(self.connections.values())

    def _admit(self, connection: Connection) -> None:
        """Adds a process that says who it is, replacing one of its number that died."""
        hello = connection.receive_first(time.monotonic() + _HELLO_S)
        peer, count = hello.get("process"), hello.get("num_processes")
        if not (isinstance(peer, int) and isinstance(count, int) and "name" in hello):
            connection.close()  # not a process of a run
            return
        if problem := self._problem(peer, count, hello["name"]):
            error = ClusterError(f"{problem}; start all of them with the same command.")
            connection.send({"refused": str(error)})
            connection.close()
            self._send_last({"refused": str(error)})
            raise error
        if peer in self.connections:
            self.connections[peer].close()
        connection.peer = peer
        self.connections[peer], self.names[peer] = connection, hello["name"]

    def _problem(self, peer: int, count: int, name: str) -> str:
        """Returns why a process cannot be one of this run, "" if it can."""
        num_processes = self.membership.num_processes
        if count != num_processes or not 0 < peer < count:
            return (
                f"process 0 on {self.names[0]} has {num_processes} processes, "
                f"process {peer} on {name} has {count}"
            )
        if peer in self.connections and not self.connections[peer].is_closed():
            return (
                f"both {self.names[peer]} and {name} say that they are process {peer}"
            )
        return ""

    def _missing(self, timeout_s: float) -> LostError:
        """Returns the error that names who did not come; tells those who did."""
        num_processes = self.membership.num_processes
        missing = [i for i in range(1, num_processes) if i not in self.connections]
        listed = ", ".join(map(str, missing[:20])) + (", ..." if missing[20:] else "")
        error = LostError(
            f"{len(missing)} of {num_processes} processes did not come to "
            f"{self.membership.coordinator} within {timeout_s:g} s: {listed}; "
            "start all of them again."
        )
        self._send_last({"missing": str(error)})
        return error

    def _send_last(self, message: Message) -> None:
        for connection in self.connections.values():
            connection.send(message)
            connection.close()


def _listener(membership: Membership, address: tuple[str, int]) -> socket.socket:
    """Returns a socket that listens at the coordinator's port."""
    host, port = address
    deadline = time.monotonic() + _PORT_BUSY_S
    interface, family = "", dict[str, Any]()
    if host in _LOOPBACK:
        interface = "127.0.0.1"  # a run on one host is nobody else's to reach
    elif socket.has_dualstack_ipv6():
        family = {"family": socket.AF_INET6, "dualstack_ipv6": True}
    while True:
        try:
            return socket.create_server(
                (interface, port), backlog=membership.num_processes, **family
            )
        except OSError as err:
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"coordinator={membership.coordinator}; process 0 cannot listen "
                    f"there ({err.strerror}); give another port."
                ) from err
        time.sleep(_RETRY_S)


def _call(
    membership: Membership, address: tuple[str, int], timeout_s: float
) -> tuple[list[str], list[Connection]]:
    """Returns all names and the connection to process 0, see `connect`."""
    deadline = time.monotonic() + timeout_s
    hello = {
        "process": membership.process_id,
        "num_processes": membership.num_processes,
        "name": _own_name(),
    }
    reason = ""
    while time.monotonic() < deadline:
        try:
            connection = Connection(socket.create_connection(address, timeout=_HELLO_S))
        except OSError as err:
            reason = err.strerror or str(err)
            time.sleep(_RETRY_S)
            continue
        connection.send(hello)
        # Process 0 gives up first, so that its answer can name who is missing.
        answer = connection.receive_first(deadline + _HELLO_S)
        if "names" in answer:
            return answer["names"], [connection]
        connection.close()
        if "refused" in answer:
            raise ClusterError(answer["refused"])
        if "missing" in answer:
            raise LostError(answer["missing"])
        reason = "it does not answer"
        time.sleep(_RETRY_S)
    raise LostError(
        f"process 0 was not found at {membership.coordinator} within {timeout_s:g} s "
        f"({reason}); start all of them again."
    )


def _own_name() -> str:
    return f"{socket.gethostname()} (pid {os.getpid()})"
