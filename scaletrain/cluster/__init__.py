"""The processes of a run: where this one is, that all agree, and that all live.

    discovery   which processes there are and which is this: flags, TPU, Slurm, ...
    rendezvous  all come to process 0  (connection: what they talk over)
    liveness    they are heard; one that is lost is named, and ends the others
    signals     requests to stop

What is imported here is all that the rest of scaletrain uses. With one process nothing
of it is done.
"""

import argparse
import ctypes
import hashlib
import itertools
import os
import pathlib
import signal
import socket
import sys
import time
import types
from collections.abc import Mapping

from scaletrain.cluster import signals
from scaletrain.cluster.discovery import discover
from scaletrain.cluster.liveness import WHY_S, Peers
from scaletrain.cluster.rendezvous import meet
from scaletrain.errors import ConfigError

__all__ = [
    "agree", "code_version", "first", "gather", "join", "lead", "leave",
    "stopped_since", "turn", "wait",
]  # fmt: skip

_JOIN_S = 300.0  # for all to come
_peers: Peers | None = None
_asked = itertools.count(1)  # whether to stop
_stopped_since: float | None = None


def join(args: argparse.Namespace) -> None:
    """Meets the other processes, if there are any, and starts jax with them.

    Raises:
      ConfigError: flags or an environment that contradict themselves.
      ClusterError: processes that contradict each other.
      LostError: processes that do not come.
    """
    global _peers
    if args.heartbeat <= 0:
        raise ConfigError([f"--heartbeat={args.heartbeat}; not above 0 s; give more."])
    place = discover(args, os.environ)
    if place is None:
        return
    print(place, file=sys.stderr, flush=True)
    names, links = meet(place, _JOIN_S)
    _peers = Peers(place.process_id, names, links, args.heartbeat)
    sys.excepthook = _uncaught
    _delay_aborts()
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = place.coordinator.rpartition(":")[0]
    port = _peers.gather("port", str(_free_port()) if lead() else "")[0]
    jax.distributed.initialize(
        f"{host}:{port}",
        place.num_processes,
        place.process_id,
        list(place.gpus) if place.gpus else None,
        cluster_detection_method="deactivate",
        # Its own heartbeat ends processes without naming the one that is lost.
        heartbeat_timeout_seconds=int(10 * args.heartbeat) + 600,
    )
    if jax.default_backend() == "cpu":
        # Of an executable that XLA:CPU has read back, a device was seen in two
        # collectives at once. Gloo knows them by their order: they mix, or hang.
        jax.config.update("jax_enable_compilation_cache", False)
    signals.share()
    kind = jax.local_devices()[0].device_kind
    agree(
        {"the devices": f"{jax.local_device_count()} x {kind}", "jax": jax.__version__}
    )


def lead() -> bool:
    """Returns whether this process speaks and writes for all of them."""
    return _peers is None or _peers.process_id == 0


def turn() -> int:
    """Returns when it is this process's turn to prepare what its host then has.

    Process 0 is first (0), then one process of every other host, which may see the
    same disks or not (1), then all the others (2).
    """
    if _peers is None or _peers.process_id == 0:
        return 0
    hosts = [name.rpartition(" (")[0] for name in _peers.names]
    return 1 if hosts.index(hosts[_peers.process_id]) == _peers.process_id else 2


def wait(name: str) -> None:
    """Waits until all processes wait for `name`, for as long as that takes."""
    gather(name, "")


def first(name: str, value: str) -> str:
    """Returns what process 0 says under `name`, once all have asked."""
    return gather(name, value)[0]


def gather(name: str, value: str) -> list[str]:
    """Returns what each process says under `name`, in order, once all have."""
    return [value] if _peers is None else _peers.gather(name, value)


def agree(facts: Mapping[str, object]) -> None:
    """Compares what must be the same in all processes, by name.

    Raises:
      ClusterError: in every process, with all that differ from process 0.
    """
    if _peers is not None:
        _peers.agree(facts)


def stopped_since() -> float | None:
    """Returns when a process was asked to stop, on this one's monotonic clock.

    All processes ask as often, and the first answer other than None comes to all of
    them at the same time: then nobody is a step ahead.
    """
    global _stopped_since
    if _peers is None:
        return signals.since()
    from jax.experimental import multihost_utils

    if multihost_utils.reached_preemption_sync_point(next(_asked)):
        now, since = time.monotonic(), signals.since()
        ago = str(0.0 if since is None else now - since)
        _stopped_since = now - max(map(float, _peers.gather("stopped", ago)))
    return _stopped_since


def leave(code: int) -> None:
    """Says goodbye to the others; ends this process if `code` is not 0."""
    if _peers is not None:
        _peers.leave(code)


def code_version() -> str:
    """Returns a digest of the source files of this package."""
    root = pathlib.Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def _uncaught(
    kind: type[BaseException], err: BaseException, trace: types.TracebackType | None
) -> None:
    """Prints what nobody caught and leaves, unless a lost process explains it."""
    time.sleep(WHY_S)
    sys.__excepthook__(kind, err, trace)
    leave(1)


def _delay_aborts() -> None:
    """Lets a process be named whose end makes jax's client abort this one.

    The client of jax's coordination service calls abort() as soon as process 0 is
    gone. C's sleep as the handler, called with the signal's number, holds the aborting
    thread for those 6 seconds; the thread of `peers` ends the process meanwhile.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
    libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))
