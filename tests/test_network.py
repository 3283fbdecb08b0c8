"""Processes on hosts of their own, as far as a network is concerned."""

import contextlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import pytest
import small

from scaletrain import config
from scaletrain.config import MeshConfig

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT_S = 4
# As long as a process takes to end, on a machine that is busy.
LIMIT_S = HEARTBEAT_S + 12
# Joins the others like a run, and waits as if in a collective that never returns.
WAITING = """\
import argparse, sys, time
from scaletrain import cluster
words = [word.partition("=") for word in sys.argv[1:]]
given = {name.removeprefix("--"): value for name, _, value in words}
numbers = {name: int(given[name]) for name in ("num_processes", "process_id")}
cluster.join(argparse.Namespace(
    coordinator=given["coordinator"], heartbeat=float(given["heartbeat"]), **numbers
))
print("joined", flush=True)
time.sleep(300)
"""


class Hosts:
    """Two network namespaces with a wire between them."""

    def __init__(self):
        self.names = [f"scaletrain{os.getpid()}-{i}" for i in range(2)]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def lay(self):
        """Makes them, skipping the test where this is not permitted."""
        if not (shutil.which("ip") and shutil.which("unshare")):
            pytest.skip("no hosts of their own: iproute2 or util-linux is missing")
        first, second = self.names
        made = subprocess.run(
            ["ip", "netns", "add", first], capture_output=True, text=True, check=False
        )
        if made.returncode:
            pytest.skip(f"no hosts of their own: {made.stderr.strip()}")
        self._ip("netns", "add", second)
        self._ip("link", "add", "wire", "netns", first, "type", "veth",
                 "peer", "name", "wire", "netns", second)  # fmt: skip
        for name, address in zip(self.names, self.addresses, strict=True):
            self._ip("-n", name, "addr", "add", f"{address}/24", "dev", "wire")
            self._ip("-n", name, "link", "set", "wire", "up")
            self._ip("-n", name, "link", "set", "lo", "up")

    def close(self):
        """Removes them."""
        for name in self.names:
            subprocess.run(
                ["ip", "netns", "delete", name], capture_output=True, check=False
            )

    def wire(self, state):
        """Sets the wire "up" or "down"; packets on it are lost without a word."""
        self._ip("-n", self.names[1], "link", "set", "wire", state)

    def _ip(self, *words):
        subprocess.run(["ip", *words], check=True)

    def start(self, folder, *command):
        """Starts a command on both as the two processes of a run."""
        processes = []
        for i, (name, address) in enumerate(
            zip(self.names, self.addresses, strict=True)
        ):
            # Gloo listens at the address of the host's name.
            on_host = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
            on_host += ['hostname "$0" && exec "$@"', address]
            env = os.environ | {
                "PYTHONPATH": str(ROOT),
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": "1",
                "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
                "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            with (folder / f"said{i}").open("w") as said:
                processes.append(
                    subprocess.Popen(
                        [*on_host, sys.executable, *command,
                         f"--coordinator={self.addresses[0]}:8482",
                         "--num_processes=2", f"--process_id={i}",
                         f"--heartbeat={HEARTBEAT_S}"],
                        env=env, stdout=said, stderr=said,
                    )
                )  # fmt: skip
        return processes


@pytest.fixture(scope="module")
def hosts():
    with contextlib.closing(Hosts()) as found:
        found.lay()
        yield found


@contextlib.contextmanager
def running(hosts, folder, *command):
    processes = hosts.start(folder, *command)
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(true, seconds=300):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def said(folder, i):
    return (folder / f"said{i}").read_text()


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_frozen_process_is_named(hosts, tmp_path, frozen):
    other = 1 - frozen
    with running(hosts, tmp_path, "-c", WAITING) as processes:
        wait_until(lambda: all("joined" in said(tmp_path, i) for i in range(2)))
        processes[frozen].send_signal(signal.SIGSTOP)
        assert processes[other].wait(LIMIT_S) == 75
        words = f"process {frozen} on {hosts.addresses[frozen]} (pid "
        assert words in said(tmp_path, other)
        assert "has not been heard for 4 s" in said(tmp_path, other)
        processes[frozen].send_signal(signal.SIGCONT)
        assert processes[frozen].wait(LIMIT_S) == 75


def test_a_run_whose_network_is_cut_ends_and_goes_on(hosts, tmp_path):
    run = small.changed(
        small.RUN,
        num_steps=100_000,
        log_every_steps=1,
        mesh=MeshConfig(data=-1),
        checkpoint__every_steps=4,
        checkpoint__keep=1,
        eval__num_batches=1,
    )
    (tmp_path / "run.json").write_text(config.to_json(run))
    workdir = tmp_path / "run"
    command = ["-m", "scaletrain.main", "train", f"--config={tmp_path / 'run.json'}"]
    command += [f"--workdir={workdir}"]

    def newest():
        found = (workdir / "checkpoints").glob("*")
        return max((int(p.name) for p in found if p.name.isdigit()), default=0)

    with running(hosts, tmp_path, *command) as processes:
        wait_until(lambda: newest() >= 4)
        hosts.wire("down")
        began = time.monotonic()
        assert [p.wait(LIMIT_S) for p in processes] == [75, 75]
        assert time.monotonic() - began < LIMIT_S
        for i in range(2):
            words = f"process {1 - i} on {hosts.addresses[1 - i]} (pid "
            assert words in said(tmp_path, i)
    hosts.wire("up")
    start = newest()
    command += [f"--config.num_steps={start + 2}"]
    with running(hosts, tmp_path, *command) as processes:
        assert [p.wait(300) for p in processes] == [0, 0]
    assert f"resuming from step {start} of " in said(tmp_path, 0)
    assert newest() == start + 2
