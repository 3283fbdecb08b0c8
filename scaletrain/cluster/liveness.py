"""The other processes of a run: values are exchanged with them, and losses named.

A thread in every process sends heartbeats and listens. A process that is silent for too
long, or whose connection closes before it said goodbye, is lost. Then no process can go
on, since every collective waits for all of them. Each prints which process is lost and
ends with the exit code that asks for a restart. The thread ends the process, because
the main thread may be inside a collective that never returns.

The messages are described in docs/internals/cluster.md.
"""

import os
import selectors
import sys
import threading
import time
from collections.abc import Callable

from scaletrain.cluster.connection import Connection, Message
from scaletrain.cluster.gathering import Gathering
from scaletrain.errors import LostError

_BEATS = 5  # heartbeats that are sent in the time after which silence is a loss
# A loss breaks collectives in this process too. Errors wait this long, so that the
# message that names the lost process arrives before them.
LOSS_FIRST_S = 1.0
_OWN_ERROR_S = 5.0  # for a process to report by itself the error that ended another
# For the others to end before process 0, because jax aborts them when process 0 exits
# first.
_OTHERS_END_S = 2.0


def end_process(line: str, code: int) -> None:
    """Ends this process immediately, whatever its other threads are doing."""
    if line:
        print(f"scaletrain: {line}", file=sys.stderr)
    sys.stderr.flush()
    sys.stdout.flush()
    os._exit(code)


class Peers:
    """The processes of this run as this one knows them.

    Args:
      process_id: of this process.
      names: of all processes, in order, such as "node1 (pid 7)".
      connections: to each of the others in process 0, to process 0 in the others.
      heartbeat_s: seconds of silence after which a process counts as lost.
      end_process: ends this process with a line for the user and an exit code.
    """

    def __init__(
        self,
        process_id: int,
        names: list[str],
        connections: list[Connection],
        heartbeat_s: float,
        end_process: Callable[[str, int], None] = end_process,
    ):
        self.process_id, self.names = process_id, names
        self._connections = connections
        self._heartbeat_s = heartbeat_s
        self._end_process = end_process
        self._gathering = Gathering(len(names))
        self._ending: tuple[float, str, int] | None = None  # deadline, line, code
        self._ended = False
        self._last_pass = time.monotonic()  # of the thread through its loop
        for connection in connections:
            connection.last_received = self._last_pass
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def name(self, process: int) -> str:
        """Returns a process's number and where it is: "1 on node1 (pid 7)"."""
        return f"{process} on {self.names[process]}"

    def gather(self, name: str, value: str) -> list[str]:
        """Returns the value of each process, in order, once all have given theirs.

        All processes must gather each name equally often; any thread may. They wait
        for the slowest however long it takes; if one is lost they end.
        """
        key = self._gathering.begin(name)
        if self.process_id:
            self._send_all({"gather": key, "value": value})
        else:
            self._collect(key, 0, value)
        return self._gathering.wait(key)

    def leave(self, code: int) -> None:
        """Says goodbye; with a code other than 0, ends this process with it.

        A code other than 0 ends the others as well, since this process takes part in
        no collective any more. It ends by `os._exit`, since an ordinary exit runs jax's
        shutdown, which waits for the others while they wait for this process.
        """
        if code == 0:
            self.gather("end", "")
        elif code != LostError.exit_code:
            time.sleep(LOSS_FIRST_S)
        self._send_all({"bye": code})
        if code:
            self._ended = True
            self._await_others(self._grace_s(code) + _OTHERS_END_S)
            self._end_process("", code)

    def _grace_s(self, code: int) -> float:
        """Returns the seconds that the others have to end by themselves.

        With the code for a restart they may all be saving, which takes long.
        """
        return self._heartbeat_s if code == LostError.exit_code else _OWN_ERROR_S

    def _watch(self) -> None:
        """Sends heartbeats, handles messages and notices losses, in a thread."""
        with selectors.DefaultSelector() as selector:
            for connection in self._connections:
                selector.register(connection, selectors.EVENT_READ)
            next_beat = time.monotonic()
            while not self._ended:
                if time.monotonic() >= next_beat:
                    self._send_all({})
                    next_beat = time.monotonic() + self._heartbeat_s / _BEATS
                wait_s = self._next_event(next_beat) - time.monotonic()
                # If this process was paused meanwhile, messages arrived although the
                # wait timed out: they count before anyone's silence does.
                ready = selector.select(max(wait_s, 0.0)) or selector.select(0)
                for key, _ in ready:
                    if not self._receive(key.fileobj):  # pyright: ignore
                        selector.unregister(key.fileobj)
                self._check_silence()

    def _next_event(self, next_beat: float) -> float:
        """Returns when the thread must act even if no message arrives."""
        silent = [
            connection.last_received + self._heartbeat_s
            for connection in self._connections
            if not connection.said_goodbye
        ]
        return min([next_beat, *silent, *(self._ending or ())[:1]])

    def _receive(self, connection: Connection) -> bool:
        """Handles the messages of a connection; returns whether more can come."""
        messages = connection.receive()
        for message in messages or ():
            self._handle(connection, message)
        if messages is not None:
            return True
        self._drop(connection)
        if not (connection.said_goodbye or self._ended or self._ending):
            self._declare_lost(connection, "ended without a word")
        return False

    def _handle(self, connection: Connection, message: Message) -> None:
        if "gather" in message:
            self._collect(message["gather"], connection.peer, message["value"])
        elif "gathered" in message:
            self._gathering.complete(message["gathered"], message["values"])
        elif "lost" in message:
            self._end_now(message["lost"], LostError.exit_code)
        elif "failed" in message:
            self._end_soon(message["failed"], message["code"])
        elif "bye" in message:
            connection.said_goodbye = True
            if code := message["bye"]:
                name = self.name(connection.peer)
                line = f"process {name} ended with exit code {code}."
                self._send_all({"failed": line, "code": code})
                self._end_soon(line, code)

    def _check_silence(self) -> None:
        """Acts on deadlines that have passed: of this process's end, or of silence."""
        now = time.monotonic()
        # Time in which this thread did not run, as on a machine that was paused, is no
        # silence of the others. They may have been paused together with it.
        paused_s = now - self._last_pass - self._heartbeat_s / _BEATS
        self._last_pass = now
        if paused_s > 0:
            for connection in self._connections:
                connection.last_received = min(now, connection.last_received + paused_s)
        if self._ending:
            deadline, line, code = self._ending
            if now >= deadline:
                self._end_now(line, code)
            return
        for connection in self._connections:
            silent_s = now - connection.last_received
            if not connection.said_goodbye and silent_s >= self._heartbeat_s:
                reason = f"has not been heard for {self._heartbeat_s:g} s"
                self._declare_lost(connection, reason)

    def _declare_lost(self, connection: Connection, reason: str) -> None:
        """Ends this process and the others, naming the one that is lost."""
        line = (
            f"process {self.name(connection.peer)} {reason}; the others cannot go on "
            "without it; start all of them again."
        )
        self._drop(connection)
        self._send_all({"lost": line})
        self._end_now(line, LostError.exit_code)

    def _end_soon(self, line: str, code: int) -> None:
        """Ends this process after a while, unless it reports the error by itself."""
        deadline = time.monotonic() + self._grace_s(code)
        self._ending = self._ending or (deadline, line, code)

    def _end_now(self, line: str, code: int) -> None:
        if not self._ended:
            self._ended = True
            self._await_others(_OTHERS_END_S)
            self._end_process(line, code)

    def _await_others(self, timeout_s: float) -> None:
        """Lets the others end first, because jax aborts them when process 0 exits."""
        deadline = time.monotonic() + timeout_s
        while self.process_id == 0 and time.monotonic() < deadline:
            if all(connection.is_closed() for connection in self._connections):
                break
            time.sleep(0.02)

    def _send_all(self, message: Message) -> None:
        for connection in self._connections:
            connection.send(message)

    def _drop(self, connection: Connection) -> None:
        # A new list, since other threads may be sending to the old one.
        self._connections = [c for c in self._connections if c is not connection]

    def _collect(self, key: str, process: int, value: str) -> None:
        """Adds one process's value in process 0, which sends a complete gather on."""
        if values := self._gathering.add(key, process, value):
            self._send_all({"gathered": key, "values": values})
            self._gathering.complete(key, values)
