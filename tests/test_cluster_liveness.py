"""That processes hear each other and agree, and that a lost one is named."""

import concurrent.futures
import contextlib
import itertools
import socket
import time

import pytest

from scaletrain.cluster import agreement, liveness
from scaletrain.cluster.connection import Connection
from scaletrain.errors import ClusterError, LostError


def connected():
    """Returns both ends of a TCP connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        caller = socket.create_connection(server.getsockname())
        return server.accept()[0], caller


class Company:
    """Processes of a run as threads of this one; `ends` is what each would end with."""

    def __init__(self, count, heartbeat_s=100.0):
        self.ends = [None] * count
        names = [f"host{i} (pid {i})" for i in range(count)]
        self.connections = [[] for _ in range(count)]
        for i in range(1, count):
            first, other = connected()
            self.connections[0].append(Connection(first, peer=i))
            self.connections[i].append(Connection(other))
        self.peers = [
            liveness.Peers(
                i, list(names), self.connections[i], heartbeat_s, self._end(i)
            )
            for i in range(count)
        ]

    def _end(self, i):
        def end(line, code):
            self.ends[i] = line, code
            self.cut(i)

        return end

    def cut(self, i):
        """Closes the connections of a peer, as the end of its process does."""
        for connection in self.connections[i]:
            with contextlib.suppress(OSError):  # cut already
                connection._socket.shutdown(socket.SHUT_RDWR)

    def each(self, work):
        """Returns what `work` returns for each of the peers, at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(self.peers)) as pool:
            return list(pool.map(work, self.peers))

    def silence(self, i):
        """Stops the thread of a peer: it neither speaks nor listens any more."""
        self.peers[i]._ended = True

    def wait_for_ends(self, *who, seconds=20.0):
        """Returns what those peers would have ended with, once they would have."""
        deadline = time.monotonic() + seconds
        while any(self.ends[i] is None for i in who) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self.ends[i] for i in who]

    def close(self):
        """Ends all threads and connections."""
        for i, connections in enumerate(self.connections):
            self.silence(i)
            for connection in connections:
                connection.send({})  # wakes the other end's thread
        time.sleep(0.05)
        for connection in itertools.chain(*self.connections):
            connection.close()


@pytest.fixture
def company():
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(contextlib.closing(Company(*args)))


@pytest.fixture(scope="module")
def three():
    with contextlib.closing(Company(3)) as threads:
        yield threads


def test_all_hear_what_each_says(three):
    for name in ("first", "again"):
        values = three.each(
            lambda p, name=name: p.gather(name, f"{name} {p.process_id}")
        )
        assert values == [[f"{name} {i}" for i in range(3)]] * 3


def test_differences_are_named_in_every_process(three):
    def agree(peer):
        facts = {"config.seed": peer.process_id // 2, "code": "same"}
        with pytest.raises(ClusterError) as caught:
            agreement.agree(peer, facts)
        agreement.agree(peer, {"code": "same"})
        return str(caught.value)

    for words in three.each(agree):
        assert "process 2 on host2 (pid 2): config.seed is 1, in process 0 0\n" in words
        assert words.count("process ") == 2
    assert ClusterError.exit_code == 2


def test_who_is_silent_is_named_by_all_others(company):
    run = company(3, 0.5)
    time.sleep(0.75)
    assert run.ends == [None] * 3
    run.silence(1)
    began = time.monotonic()
    first, third = run.wait_for_ends(0, 2)
    assert time.monotonic() - began < 5
    for line, code in (first, third):
        assert code == LostError.exit_code == 75
        assert "process 1 on host1 (pid 1) has not been heard for 0.5 s" in line


def test_nobody_is_silent_while_all_are_paused(company, monkeypatch):
    clock, paused_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + paused_s[0])
    run = company(3, 0.5)
    for _ in range(10):
        paused_s[0] += 1000.0
        time.sleep(0.05)
    assert run.ends == [None] * 3
    run.silence(1)
    for line, code in run.wait_for_ends(0, 2):
        assert "process 1 on " in line
        assert code == 75


def test_a_silent_process_0_is_named(company):
    run = company(2, 0.5)
    run.silence(0)
    [(line, code)] = run.wait_for_ends(1)
    assert line.startswith("process 0 on ")
    assert code == 75


def test_who_ends_without_a_word_is_named_at_once(company):
    run = company(3)
    run.silence(2)
    run.cut(2)
    for line, code in run.wait_for_ends(0, 1):
        assert line.startswith("process 2 on ")
        assert "ended without a word" in line
        assert code == 75


def test_who_fails_takes_the_others_along(company, monkeypatch):
    monkeypatch.setattr(liveness, "LOSS_FIRST_S", 0.05)
    monkeypatch.setattr(liveness, "_OWN_ERROR_S", 0.2)
    run = company(3)
    run.peers[1].leave(2)
    assert run.ends[1] == ("", 2)
    for line, code in run.wait_for_ends(0, 2):
        assert line.startswith("process 1 on ")
        assert "ended with exit code 2" in line
        assert code == 2


def test_who_is_done_may_go(company):
    run = company(2, 0.3)
    run.each(lambda p: p.leave(0))
    run.silence(1)
    run.cut(1)
    time.sleep(0.6)
    assert run.ends == [None, None]
