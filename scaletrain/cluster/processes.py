"""The processes of a run, as the rest of scaletrain sees them: join, gather, leave.

The state is global to this module, because a Python process belongs to one run. Until
`join` finds other processes, it is that of a run of one process.
"""

import argparse
import itertools
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping

from scaletrain.cluster import agreement, crashes, rendezvous, signals
from scaletrain.cluster.discovery import Membership, discover
from scaletrain.cluster.liveness import Peers
from scaletrain.errors import ConfigError

_JOIN_S = 300.0  # for all processes to come

_peers: Peers | None = None  # None: this is the only process
_sync_points = itertools.count(1)  # at which all processes ask whether to stop
_stopped_since: float | None = None


def join(args: argparse.Namespace) -> None:
    """Connects to the other processes, if there are any, and starts jax with them.

    Args:
      args: coordinator, num_processes and process_id, each None if not given, and
        heartbeat, in seconds.

    Raises:
      ConfigError: flags or an environment that contradict themselves.
      ClusterError: processes that contradict each other.
      LostError: processes that do not come.
    """
    global _peers
    if args.heartbeat <= 0:
        raise ConfigError([f"--heartbeat={args.heartbeat}; not above 0 s; give more."])
    membership = discover(args, os.environ)
    if membership is None:
        return
    print(membership, file=sys.stderr, flush=True)
    names, connections = rendezvous.connect(membership, _JOIN_S)
    _peers = Peers(membership.process_id, names, connections, args.heartbeat)
    crashes.delay_tracebacks(leave)
    crashes.delay_aborts()
    _start_jax(membership, args.heartbeat)


def lead() -> bool:
    """Returns whether this process prints and writes files for all of them."""
    return _peers is None or _peers.process_id == 0


def in_turns[T](work: Callable[[], T]) -> T:
    """Returns what `work()` returns in this process, which may use the others' files.

    Process 0 works first, then one process of every other host, then the rest: a host
    may or may not see the disks of another, and its processes share theirs.
    """
    if _peers is None:
        return work()
    own_turn, results = _turn(_peers), []
    for turn in range(3):
        if turn == own_turn:
            results.append(work())
        wait("turn")
    return results[0]


def _turn(peers: Peers) -> int:
    """Returns when this process works in turns: 0, 1 or 2."""
    if peers.process_id == 0:
        return 0
    hosts = [name.rpartition(" (")[0] for name in peers.names]
    return 1 if hosts.index(hosts[peers.process_id]) == peers.process_id else 2


def wait(name: str) -> None:
    """Waits until all processes wait for `name`, for as long as that takes."""
    gather(name, "")


def decide(name: str, value: bool) -> bool:
    """Returns the value of process 0, once all processes have given theirs."""
    return gather(name, str(value))[0] == str(True)


def gather(name: str, value: str) -> list[str]:
    """Returns the value of each process, in order, once all have given theirs."""
    return [value] if _peers is None else _peers.gather(name, value)


def agree(facts: Mapping[str, object]) -> None:
    """Compares facts by name, which must be the same in all processes.

    Raises:
      ClusterError: in every process, with all that differ from process 0.
    """
    if _peers is not None:
        agreement.agree(_peers, facts)


def stopped_since() -> float | None:
    """Returns when a process was first asked to stop, in monotonic seconds of this one.

    All processes must ask equally often. The answer becomes other than None in the same
    call of all of them, so that none takes a step more than the others.
    """
    global _stopped_since
    if _peers is None:
        return signals.since()
    from jax.experimental import multihost_utils

    if multihost_utils.reached_preemption_sync_point(next(_sync_points)):
        # Clocks differ between hosts, durations do not.
        now, since = time.monotonic(), signals.since()
        ago_s = str(0.0 if since is None else now - since)
        _stopped_since = now - max(map(float, _peers.gather("stopped", ago_s)))
    return _stopped_since


def leave(code: int) -> None:
    """Says goodbye to the others; ends this process if `code` is not 0."""
    if _peers is not None:
        _peers.leave(code)


def _start_jax(membership: Membership, heartbeat_s: float) -> None:
    """Starts jax as one of the processes, and compares their devices.

    Args:
      membership: of this process.
      heartbeat_s: seconds of silence after which a process counts as lost.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = membership.coordinator.rpartition(":")[0]
    port = gather("port", str(_free_port()) if lead() else "")[0]
    jax.distributed.initialize(
        f"{host}:{port}",
        membership.num_processes,
        membership.process_id,
        list(membership.gpus) if membership.gpus else None,
        cluster_detection_method="deactivate",
        # Its own heartbeat ends processes without naming the one that is lost.
        heartbeat_timeout_seconds=int(10 * heartbeat_s) + 600,
    )
    if jax.default_backend() == "cpu":
        # An executable that XLA:CPU has read back was seen to run two collectives of
        # one device at once. Gloo tells collectives apart by their order alone, so that
        # they mix or hang.
        jax.config.update("jax_enable_compilation_cache", False)
    signals.share()
    kind = jax.local_devices()[0].device_kind
    agree(
        {"the devices": f"{jax.local_device_count()} x {kind}", "jax": jax.__version__}
    )


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
