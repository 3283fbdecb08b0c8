"""Which processes a run has and which of them this is: flags, or what launched it.

Asked in this order: the flags, which a person wrote; TPU metadata; Slurm; JobSet; Open
MPI. Nothing here imports jax, whose own detection gives each task of Slurm one GPU
however many it has, and waits for tasks that an interactive shell never starts.
"""

import argparse
import dataclasses
import glob
import importlib.util
import re
import socket
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Mapping

from scaletrain.errors import ConfigError

_PORT = 8482  # on hosts that serve one run at a time
_PORTS = range(61440, 65536)  # beyond those that Linux gives to outgoing connections
_ASK_S, _ASK_TIMES = 5.0, 6  # of the metadata server

Environ = Mapping[str, str]
Metadata = Callable[[str], str | None]


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    source: str  # what said so
    num_processes: int
    process_id: int
    coordinator: str  # HOST:PORT where process 0 meets the others; "" = not said
    gpus: tuple[int, ...] | None = None  # of those that are visible; None = all

    def __str__(self) -> str:
        return (
            f"processes: {self.num_processes} by {self.source}, this is "
            f"{self.process_id}, coordinator {self.coordinator}"
        )


def find(args: argparse.Namespace, env: Environ, metadata: Metadata) -> Place | None:
    """Returns the place of this process, None where it is the only one.

    Raises:
      ConfigError: flags or an environment that contradict themselves.
    """
    place = _by_flags(args)
    for launcher in (_tpu, _slurm, _jobset, _open_mpi):
        place = place or launcher(env, metadata)
    if place is None:
        if args.coordinator:
            raise _incomplete()
        return None
    if args.coordinator:
        place = dataclasses.replace(place, coordinator=args.coordinator)
    return place if _checked(place).num_processes > 1 else None


def _by_flags(args: argparse.Namespace) -> Place | None:
    given = (args.num_processes, args.process_id, args.coordinator)
    if given[:2] == (None, None):
        return None  # a coordinator alone completes what a launcher says
    if None in given:
        raise _incomplete()
    return Place("flags", *given)


def _incomplete() -> ConfigError:
    return ConfigError(
        [
            "--coordinator, --num_processes, --process_id; only some are given; "
            "give all three to every process, or none."
        ]
    )


def _checked(place: Place) -> Place:
    """Raises ConfigError with everything that is wrong about `place`."""
    n, i = place.num_processes, place.process_id
    problems = []
    if n < 1:
        problems.append(f"num_processes={n}; below 1; give 1 or more.")
    elif not 0 <= i < n:
        problems.append(
            f"process_id={i}; not one of {n} processes; number them 0 to {n - 1}."
        )
    host, colon, port = place.coordinator.rpartition(":")
    if n > 1 and not place.coordinator:
        problems.append(
            "coordinator; not said where process 0 runs; give --coordinator=HOST:PORT."
        )
    elif n > 1 and not (host and colon and port.isdigit() and 0 < int(port) < 2**16):
        problems.append(f"coordinator={place.coordinator}; give HOST:PORT.")
    if problems:
        raise ConfigError([f"{place.source}: {problem}" for problem in problems])
    return place


def _tpu(env: Environ, metadata: Metadata) -> Place | None:
    """GKE and sliced hosts say it in the environment, Cloud TPU VMs in metadata."""
    if not _has_tpu(env):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    worker = env.get("TPU_WORKER_ID")
    slices: Environ = env
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env:
        worker, hosts = metadata("agent-worker-number"), _endpoints(metadata)
        slices = _settings(metadata("tpu-env") or "") | dict(env)
    if not hosts:
        return None
    names = [word.split(":")[0] for word in hosts.split(",")]
    found = {"TPU_WORKER_ID": worker or ""} | {
        name: slices.get(name) or default
        for name, default in (
            ("MEGASCALE_NUM_SLICES", "1"),
            ("MEGASCALE_SLICE_ID", "0"),
        )
    }
    worker_id, num_slices, slice_id = _numbers("TPU metadata", found, found)
    leader = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    return Place(
        "TPU metadata",
        len(names) * num_slices,
        worker_id + slice_id * len(names),
        f"{leader}:{_PORT}",
    )


def _has_tpu(env: Environ) -> bool:
    """Returns whether jax could find a TPU here, without starting it."""
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _endpoints(metadata: Metadata) -> str:
    """Returns the workers of a Cloud TPU VM's slice; older VMs list name:id:address."""
    found = (metadata("worker-network-endpoints") or "").split(",")
    return ",".join(word.split(":")[-1] for word in found)


def _settings(text: str) -> dict[str, str]:
    """Returns the values in lines such as NAME: 'value'."""
    pairs = [line.partition(":") for line in text.splitlines()]
    return {name.strip(): value.strip().strip("'") for name, _, value in pairs}


def ask_metadata(key: str) -> str | None:
    """Returns an attribute that Google's cloud gives this machine, None if none.

    Raises:
      ConfigError: there is a metadata server and it does not answer.
    """
    host = "metadata.google.internal"
    try:
        socket.getaddrinfo(host, 80)
    except OSError:
        return None  # another cloud
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    why = ""
    for _ in range(_ASK_TIMES):
        try:
            with direct.open(request, timeout=_ASK_S) as answer:
                return answer.read().decode("utf-8")
        except urllib.error.HTTPError as err:
            if err.code == 404:
                return None
            why = str(err)
        except OSError as err:
            why = str(err)
        time.sleep(0.5)
    raise ConfigError(
        [
            f"TPU metadata: {host} does not answer ({why}); start again, or give "
            "--coordinator, --num_processes and --process_id."
        ]
    )


def _slurm(env: Environ, metadata: Metadata) -> Place | None:
    """A task that srun started; a shell on an allocation is not one of a step."""
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if "SLURM_STEP_NODELIST" not in env or names[0] not in env:
        return None
    tasks, task, job, step = _numbers("Slurm", env, names)
    # The first name of lists such as node[001-004,7],other.
    nodes = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"])
    return Place(
        "Slurm",
        tasks,
        task,
        f"{nodes.split(',')[0]}:{_port(f'{job}.{step}')}",
        None if "SLURM_GPUS_PER_TASK" in env else _gpus(env, *_slurm_tasks_here(env)),
    )


def _slurm_tasks_here(env: Environ) -> tuple[int, int]:
    """Returns the number of this task on its node, and of how many there."""
    local, node = _numbers("Slurm", env, ("SLURM_LOCALID", "SLURM_NODEID"))
    counts = []
    for word in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if not (found := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)):
            raise _unsaid("Slurm", "SLURM_STEP_TASKS_PER_NODE", word)
        counts += [int(found[1])] * int(found[2] or 1)
    if node >= len(counts):
        raise _unsaid("Slurm", "SLURM_NODEID", str(node))
    return local, counts[node]


def _jobset(env: Environ, metadata: Metadata) -> Place | None:
    """Pods that the manifests of launch/gke start; TPU pods are known before."""
    if "JOBSET_NAME" not in env:
        return None
    names = ("PODS_PER_JOB", "JOB_COMPLETION_INDEX", "NUM_JOBS", "JOB_INDEX")
    one_job = {"NUM_JOBS": "1", "JOB_INDEX": "0"}
    pods, pod, jobs, job = _numbers("JobSet", one_job | dict(env), names)
    jobset, replicated = env["JOBSET_NAME"], env.get("REPLICATED_JOB_NAME")
    if not replicated:
        raise _unsaid("JobSet", "REPLICATED_JOB_NAME", "")
    return Place(
        "JobSet",
        pods * jobs,
        pod + job * pods,
        f"{jobset}-{replicated}-0-0.{jobset}:{_PORT}",
    )


def _open_mpi(env: Environ, metadata: Metadata) -> Place | None:
    """Open MPI before version 5 says where mpirun runs, which is where process 0 is."""
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in names)
    size, rank, local, local_size = _numbers("Open MPI", env, names)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    job = uri.partition(".")[0] or env.get("PMIX_NAMESPACE", "")
    coordinator = ""
    if local_size == size:
        coordinator = f"127.0.0.1:{_port(job)}"
    elif found := re.search(r"tcp6?://\[?([^],;]+?)[],:]", uri):
        coordinator = f"{found[1]}:{_port(job)}"
    return Place("Open MPI", size, rank, coordinator, _gpus(env, local, local_size))


def _gpus(env: Environ, local: int, tasks: int) -> tuple[int, ...] | None:
    """Returns the visible GPUs that are this task's of `tasks` on its host."""
    visible = env.get("CUDA_VISIBLE_DEVICES", "")
    count = len(visible.split(",")) if visible else tasks
    if tasks == 1 or count == 1:  # alone, or the launcher gave each its own
        return None
    if count % tasks:
        raise ConfigError(
            [
                f"CUDA_VISIBLE_DEVICES={visible}; {tasks} processes of this host "
                f"cannot share {count} GPUs evenly; start a number that divides it."
            ]
        )
    share = count // tasks
    return tuple(range(local * share, (local + 1) * share))


def _numbers(source: str, env: Environ, names: tuple[str, ...] | Environ) -> list[int]:
    """Returns variables that a launcher must have set together."""
    for name in names:
        if not env.get(name, "").isdigit():
            raise _unsaid(source, name, env.get(name, ""))
    return [int(env[name]) for name in names]


def _unsaid(source: str, name: str, value: str) -> ConfigError:
    return ConfigError(
        [
            f"{source}: {name}={value}; not what {source} sets it to; start every "
            "process with it, or give --coordinator, --num_processes, --process_id."
        ]
    )


def _port(job: str) -> int:
    """Returns a port that every process of a job finds, and another job seldom."""
    return _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]
