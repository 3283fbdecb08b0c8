"""The ranks of Open MPI, which mpirun starts."""

import re

from scaletrain.cluster.discovery.environment import (
    Environ,
    job_port,
    local_gpus,
    numbers,
)
from scaletrain.cluster.discovery.membership import Membership


def detect(env: Environ) -> Membership | None:
    """Returns the membership of this rank, None outside mpirun.

    Open MPI before version 5 says where mpirun runs, which is where rank 0 is. Since
    then the coordinator is known only if all ranks are on one host.

    Raises:
      ConfigError: variables that Open MPI does not set like this.
    """
    if "OMPI_COMM_WORLD_SIZE" not in env:
        return None
    names = ("SIZE", "RANK", "LOCAL_RANK", "LOCAL_SIZE")
    names = tuple(f"OMPI_COMM_WORLD_{name}" for name in names)
    size, rank, local_id, num_local = numbers("Open MPI", env, names)
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    job = uri.partition(".")[0] or env.get("PMIX_NAMESPACE", "")
    coordinator = ""
    if num_local == size:
        coordinator = f"127.0.0.1:{job_port(job)}"
    elif match := re.search(r"tcp6?://\[?([^],;]+?)[],:]", uri):
        coordinator = f"{match[1]}:{job_port(job)}"
    gpus = local_gpus(env, local_id, num_local)
    return Membership("Open MPI", size, rank, coordinator, gpus)
