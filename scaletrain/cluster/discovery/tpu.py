"""The hosts of TPU slices: one process a host, numbered by the cloud.

GKE, and hosts whose slice is divided, have the numbers in the environment. Cloud TPU
VMs have them in the metadata of the machine.
"""

import glob
import importlib.util

from scaletrain.cluster.discovery import metadata
from scaletrain.cluster.discovery.environment import FIXED_PORT, Environ, numbers
from scaletrain.cluster.discovery.membership import Membership

_ONE_SLICE = {"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"}


def detect(env: Environ) -> Membership | None:
    """Returns the membership of this TPU host, None without TPUs or other hosts.

    Raises:
      ConfigError: numbers are missing, or the metadata server does not answer.
    """
    if not _has_tpu(env):
        return None
    hosts = env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES")
    worker = env.get("TPU_WORKER_ID")
    slices: Environ = env
    if not hosts and "TPU_SKIP_MDS_QUERY" not in env:
        worker, hosts = metadata.attribute("agent-worker-number"), _endpoints()
        slices = _settings(metadata.attribute("tpu-env") or "") | dict(env)
    if not hosts:
        return None
    names = [word.split(":")[0] for word in hosts.split(",")]
    values = {"TPU_WORKER_ID": worker or ""}
    values |= {name: slices.get(name) or one for name, one in _ONE_SLICE.items()}
    worker_id, num_slices, slice_id = numbers("TPU metadata", values, values)
    leader = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    return Membership(
        "TPU metadata",
        len(names) * num_slices,
        worker_id + slice_id * len(names),
        f"{leader}:{FIXED_PORT}",
    )


def _has_tpu(env: Environ) -> bool:
    """Returns whether jax would find a TPU on this host, without starting it."""
    if "tpu" not in (env.get("JAX_PLATFORMS") or "tpu"):
        return False
    chips = glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")
    return bool(chips) and importlib.util.find_spec("libtpu") is not None


def _endpoints() -> str:
    """Returns the hosts of a Cloud TPU VM's slice; older VMs list name:id:address."""
    endpoints = (metadata.attribute("worker-network-endpoints") or "").split(",")
    return ",".join(word.split(":")[-1] for word in endpoints)


def _settings(text: str) -> dict[str, str]:
    """Returns the values in lines such as NAME: 'value'."""
    pairs = [line.partition(":") for line in text.splitlines()]
    return {name.strip(): value.strip().strip("'") for name, _, value in pairs}
