"""That the processes of a run find each other, and name those that do not come."""

import concurrent.futures
import contextlib
import socket
import time

import pytest

from scaletrain.cluster import rendezvous
from scaletrain.cluster.discovery import Membership
from scaletrain.errors import ClusterError, LostError


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    """Lets a process that comes before process 0 try again without delay."""
    monkeypatch.setattr(rendezvous, "_RETRY_S", 0.01)


def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def rendezvous_of(count, *ids, timeout_s=1.0):
    """Returns for each of these processes of a run what it gets, or its error."""
    address = coordinator()

    def connect(i):
        try:
            return rendezvous.connect(Membership("test", count, i, address), timeout_s)
        except ClusterError as err:
            return err

    with concurrent.futures.ThreadPoolExecutor(len(ids)) as pool:
        return list(pool.map(connect, ids))


def test_who_does_not_come_is_named():
    for err in rendezvous_of(4, 0, 2):
        assert isinstance(err, LostError)
        assert "2 of 4 processes did not come to 127.0.0.1:" in str(err)
        assert "within 1 s: 1, 3; start" in str(err)
    [err] = rendezvous_of(2, 1, timeout_s=0.1)
    assert "process 0 was not found at 127.0.0.1:" in str(err)


def test_two_processes_of_one_number_are_refused():
    for err in rendezvous_of(3, 0, 1, 1, timeout_s=20.0):
        assert type(err) is ClusterError
        assert "say that they are process 1; start all of them" in str(err)


def test_strangers_at_the_port_change_nothing():
    address = coordinator()
    host, _, port = address.partition(":")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(rendezvous.connect, Membership("test", 2, 0, address), 20.0)
        with contextlib.closing(connected(host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            second = pool.submit(
                rendezvous.connect, Membership("test", 2, 1, address), 20.0
            )
            assert first.result()[0] == second.result()[0]
            for met in (first, second):
                met.result()[1][0].close()


def connected(host, port):
    while True:
        try:
            return socket.create_connection((host, port))
        except ConnectionRefusedError:
            time.sleep(0.01)
