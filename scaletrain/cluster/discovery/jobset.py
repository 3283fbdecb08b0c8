"""The pods of a Kubernetes JobSet, as the manifests of launch/gke start them."""

from scaletrain.cluster.discovery.environment import (
    FIXED_PORT,
    Environ,
    numbers,
    unexpected,
)
from scaletrain.cluster.discovery.membership import Membership

_ONE_JOB = {"NUM_JOBS": "1", "JOB_INDEX": "0"}


def detect(env: Environ) -> Membership | None:
    """Returns the membership of this pod, None outside a JobSet.

    Raises:
      ConfigError: variables that the manifests do not set like this.
    """
    if "JOBSET_NAME" not in env:
        return None
    names = ("PODS_PER_JOB", "JOB_COMPLETION_INDEX", "NUM_JOBS", "JOB_INDEX")
    pods, pod, jobs, job = numbers("JobSet", _ONE_JOB | dict(env), names)
    jobset, replicated = env["JOBSET_NAME"], env.get("REPLICATED_JOB_NAME")
    if not replicated:
        raise unexpected("JobSet", "REPLICATED_JOB_NAME", "")
    return Membership(
        "JobSet",
        pods * jobs,
        pod + job * pods,
        f"{jobset}-{replicated}-0-0.{jobset}:{FIXED_PORT}",
    )
