"""That processes meet and agree, and that a lost one is named."""

import argparse
import concurrent.futures
import contextlib
import itertools
import socket
import time

import pytest

from scaletrain import cluster
from scaletrain.cluster import liveness, rendezvous
from scaletrain.cluster.discovery import Membership
from scaletrain.errors import ClusterError, LostError


def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Company:
    """Processes of a run as threads of this one; `ends` is what each would end with."""

    def __init__(self, count, heartbeat_s=100.0):
        self.ends = [None] * count
        where = coordinator()
        places = [Membership("test", count, i, where) for i in range(count)]
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            met = list(pool.map(lambda p: rendezvous.meet(p, 20.0), places))
        self.links = [links for _, links in met]
        self.peers = [
            liveness.Peers(i, names, links, heartbeat_s, self._end(i))
            for i, (names, links) in enumerate(met)
        ]

    def _end(self, i):
        def end(line, code):
            self.ends[i] = line, code
            self.cut(i)

        return end

    def cut(self, i):
        """Closes the connections of a peer, as the end of its process does."""
        for link in self.links[i]:
            with contextlib.suppress(OSError):  # cut already
                link._socket.shutdown(socket.SHUT_RDWR)

    def each(self, work):
        """Returns what `work` returns for each of the peers, at the same time."""
        with concurrent.futures.ThreadPoolExecutor(len(self.peers)) as pool:
            return list(pool.map(work, self.peers))

    def silence(self, i):
        """Stops the thread of a peer: it neither speaks nor listens any more."""
        self.peers[i]._over = True

    def wait_for_ends(self, *who, seconds=20.0):
        """Returns what those peers would have ended with, once they would have."""
        deadline = time.monotonic() + seconds
        while any(self.ends[i] is None for i in who) and time.monotonic() < deadline:
            time.sleep(0.01)
        return [self.ends[i] for i in who]

    def close(self):
        """Ends all threads and connections."""
        for i, links in enumerate(self.links):
            self.silence(i)
            for link in links:
                link.send({})  # wakes the other end's thread
        time.sleep(0.05)
        for link in itertools.chain(*self.links):
            link.close()


@pytest.fixture
def company():
    with contextlib.ExitStack() as stack:
        yield lambda *args: stack.enter_context(contextlib.closing(Company(*args)))


@pytest.fixture(scope="module")
def three():
    with contextlib.closing(Company(3)) as found:
        yield found


def test_all_hear_what_each_says(three):
    three.peers[1].names[1] = "elsewhere (pid 1)"
    for name in ("first", "again"):
        found = three.each(
            lambda p, name=name: p.gather(name, f"{name} {p.process_id}")
        )
        assert found == [[f"{name} {i}" for i in range(3)]] * 3


def test_differences_are_named_in_every_process(three):
    def agree(peer):
        facts = {"config.seed": peer.process_id // 2, "code": "same"}
        with pytest.raises(ClusterError) as caught:
            peer.agree(facts)
        peer.agree({"code": "same"})
        return str(caught.value)

    for words in three.each(agree):
        assert "process 2 on " in words
        assert ": config.seed is 1, in process 0 0\n" in words
        assert words.count("process ") == 2
    assert ClusterError.exit_code == 2


def test_who_is_silent_is_named_by_all_others(company):
    found = company(3, 1.0)
    time.sleep(1.5)
    assert found.ends == [None] * 3
    found.silence(1)
    began = time.monotonic()
    first, third = found.wait_for_ends(0, 2)
    assert time.monotonic() - began < 5
    for line, code in (first, third):
        assert code == LostError.exit_code == 75
        assert f"process 1 on {socket.gethostname()} (pid " in line
        assert "has not been heard for 1 s" in line


def test_nobody_is_silent_while_all_are_paused(company, monkeypatch):
    clock, paused_s = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock() + paused_s[0])
    found = company(3, 1.0)
    for _ in range(10):
        paused_s[0] += 1000.0
        time.sleep(0.05)
    assert found.ends == [None] * 3
    found.silence(1)
    for line, code in found.wait_for_ends(0, 2):
        assert "process 1 on " in line
        assert code == 75


def test_a_silent_process_0_is_named(company):
    found = company(2, 1.0)
    found.silence(0)
    [(line, code)] = found.wait_for_ends(1)
    assert line.startswith("process 0 on ")
    assert code == 75


def test_who_ends_without_a_word_is_named_at_once(company):
    found = company(3)
    found.silence(2)
    found.cut(2)
    for line, code in found.wait_for_ends(0, 1):
        assert line.startswith("process 2 on ")
        assert "ended without a word" in line
        assert code == 75


def test_who_fails_takes_the_others_along(company, monkeypatch):
    monkeypatch.setattr(liveness, "_OWN_WORDS_S", 0.2)
    found = company(3)
    found.peers[1].leave(2)
    assert found.ends[1] == ("", 2)
    for line, code in found.wait_for_ends(0, 2):
        assert line.startswith("process 1 on ")
        assert "ended with exit code 2" in line
        assert code == 2


def test_who_is_done_may_go(company):
    found = company(2, 0.5)
    found.each(lambda p: p.leave(0))
    found.silence(1)
    found.cut(1)
    time.sleep(1.0)
    assert found.ends == [None, None]


def meeting_of(count, *ids, wait_s=2.0):
    """Returns what came of the processes of a run that did come."""
    where = coordinator()

    def come(i):
        try:
            return rendezvous.meet(Membership("test", count, i, where), wait_s)
        except ClusterError as err:
            return err

    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        return list(pool.map(come, ids))


def test_who_does_not_come_is_named():
    for err in meeting_of(4, 0, 2):
        assert isinstance(err, LostError)
        assert "2 of 4 processes did not come to 127.0.0.1:" in str(err)
        assert "within 2 s: 1, 3; start" in str(err)
    [err] = meeting_of(2, 1, wait_s=0.5)
    assert "process 0 was not found at 127.0.0.1:" in str(err)


def test_two_processes_of_one_number_are_refused():
    for err in meeting_of(3, 0, 1, 1, wait_s=20.0):
        assert type(err) is ClusterError
        assert "say that they are process 1; start all of them" in str(err)


def test_strangers_at_the_port_change_nothing():
    where = coordinator()
    host, _, port = where.partition(":")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.meet, Membership("test", 2, 0, where), 20.0)
        with contextlib.closing(connected(host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            second = pool.submit(rendezvous.meet, Membership("test", 2, 1, where), 20.0)
            assert first.result()[0] == second.result()[0]
            for met in (first, second):
                met.result()[1][0].close()


def connected(host, port):
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            time.sleep(0.01)


def test_one_process_of_a_host_prepares_for_the_others(monkeypatch):
    names = ["a (pid 1)", "b (pid 1)", "a (pid 2)", "b (pid 2)"]
    turns = []
    for i in range(4):
        monkeypatch.setattr(
            cluster, "_peers", argparse.Namespace(names=names, process_id=i)
        )
        turns.append(cluster.turn())
    assert turns == [0, 1, 2, 2]
