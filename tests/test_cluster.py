"""Which processes there are, that they meet and agree, and that a lost one is named."""

import argparse
import concurrent.futures
import contextlib
import itertools
import socket
import time

import pytest

from scaletrain import cluster
from scaletrain.cluster import discovery, liveness, rendezvous
from scaletrain.cluster.discovery import Place
from scaletrain.errors import ClusterError, ConfigError, LostError

NOBODY = {
    "coordinator": None,
    "num_processes": None,
    "process_id": None,
    "heartbeat": 100.0,
}
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "rack[07-09,12]n2,other",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1(x2)",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
JOBSET = {
    "JOBSET_NAME": "run",
    "REPLICATED_JOB_NAME": "workers",
    "PODS_PER_JOB": "4",
    "JOB_COMPLETION_INDEX": "3",
    "NUM_JOBS": "2",
    "JOB_INDEX": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE_TPU = {
    "TPU_WORKER_HOSTNAMES": "t-0.svc,t-1.svc",
    "TPU_WORKER_ID": "1",
    "MEGASCALE_NUM_SLICES": "3",
    "MEGASCALE_SLICE_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "first.svc:8080",
}
TPU_VM = {
    "agent-worker-number": "2",
    "worker-network-endpoints": "a:b:10.0.0.7,a:b:10.0.0.8,a:b:10.0.0.9",
    "tpu-env": "ZONE: 'here'\nMEGASCALE_NUM_SLICES: ''\n",
}


def find(env, metadata=None, **flags):
    args = argparse.Namespace(**NOBODY | flags)
    return discovery.find(args, env, (metadata or {}).get)


@pytest.fixture
def with_tpu(monkeypatch):
    monkeypatch.setattr(discovery, "_has_tpu", lambda env: True)


@pytest.mark.parametrize(
    ("env", "words"),
    [
        (SLURM, "processes: 8 by Slurm, this is 3, coordinator rack07n2:"),
        (JOBSET, "processes: 8 by JobSet, this is 7, coordinator run-workers-0-0.run:"),
        (OPEN_MPI, "processes: 4 by Open MPI, this is 2, coordinator 10.96.0.1:"),
        (OPEN_MPI | SLURM | JOBSET, "processes: 8 by Slurm,"),
        (OPEN_MPI | JOBSET, "processes: 8 by JobSet,"),
    ],
)
def test_launchers_are_known(env, words):
    found = find(env)
    assert str(found).startswith(words)
    port = int(found.coordinator.rpartition(":")[2])
    assert 1024 < port < 2**16
    # What a person says goes before what a launcher does.
    flags = {"coordinator": "h:1", "num_processes": 2, "process_id": 1}
    assert str(find(env, **flags)) == (
        "processes: 2 by flags, this is 1, coordinator h:1"
    )
    assert find(env, coordinator="[::1]:5").coordinator == "[::1]:5"


def test_tpus_are_known(with_tpu):
    assert str(find(GKE_TPU | SLURM)) == (
        "processes: 6 by TPU metadata, this is 5, coordinator first.svc:8482"
    )
    assert str(find({}, TPU_VM)) == (
        "processes: 3 by TPU metadata, this is 2, coordinator 10.0.0.7:8482"
    )
    newer = TPU_VM | {"worker-network-endpoints": "w0,w1,w2"}
    assert find({}, newer).coordinator == "w0:8482"
    assert find({}, {}) is None
    assert find({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}) is None
    with pytest.raises(ConfigError, match="TPU metadata: TPU_WORKER_ID=; not what"):
        find({"TPU_WORKER_HOSTNAMES": "a,b"})


def test_a_single_process_is_alone():
    allocation = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
    shell = SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}
    shell |= {"SLURM_STEP_TASKS_PER_NODE": "1", "SLURM_NODEID": "0"}
    for env in ({}, allocation, shell, {"JOB_COMPLETION_INDEX": "3"}):
        assert find(env) is None
    assert find({}, coordinator="h:1", num_processes=1, process_id=0) is None


@pytest.mark.parametrize(
    ("env", "flags", "words"),
    [
        ({}, {"num_processes": 2}, "only some are given; give all three"),
        ({}, {"coordinator": "h:1"}, "only some are given; give all three"),
        (SLURM, {"process_id": 2}, "only some are given; give all three"),
        (
            {},
            {"coordinator": "h", "num_processes": 2, "process_id": 2},
            "(?s)flags: process_id=2; not one of 2 processes.*coordinator=h; give HOST",
        ),
        (SLURM | {"SLURM_PROCID": "8"}, {}, "Slurm: process_id=8; not one of 8"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "x"}, {}, "TASKS_PER_NODE=x; not what"),
        ({"JOBSET_NAME": "run"}, {}, "JobSet: PODS_PER_JOB=; not what JobSet sets"),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""},
            {},
            "Open MPI: coordinator; not said where process 0 runs; give --coordinator",
        ),
        (
            SLURM | {"CUDA_VISIBLE_DEVICES": "0,1,2"},
            {},
            "2 processes of this host cannot share 3 GPUs evenly",
        ),
    ],
)
def test_contradictions_are_told(env, flags, words):
    with pytest.raises(ConfigError, match=words):
        find(env, **flags)


@pytest.mark.parametrize(
    ("env", "gpus"),
    [
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, (2, 3)),
        ({"CUDA_VISIBLE_DEVICES": "4"}, None),  # each has its own
        ({"CUDA_VISIBLE_DEVICES": "4,5", "SLURM_GPUS_PER_TASK": "2"}, None),
        ({}, (1,)),
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x8)", "SLURM_LOCALID": "0"}, None),
    ],
)
def test_tasks_of_a_host_share_its_gpus(env, gpus):
    assert find(SLURM | env).gpus == gpus


def coordinator():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


class Company:
    """Processes of a run as threads of this one; `ends` is what each would end with."""

    def __init__(self, count, heartbeat_s=100.0):
        self.ends = [None] * count
        where = coordinator()
        places = [Place("test", count, i, where) for i in range(count)]
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
            return rendezvous.meet(Place("test", count, i, where), wait_s)
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
        first = pool.submit(rendezvous.meet, Place("test", 2, 0, where), 20.0)
        with contextlib.closing(connected(host, int(port))) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
            second = pool.submit(rendezvous.meet, Place("test", 2, 1, where), 20.0)
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
