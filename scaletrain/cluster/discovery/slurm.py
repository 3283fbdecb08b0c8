"""The tasks of a Slurm step, which srun starts."""

import re

from scaletrain.cluster.discovery.environment import (
    Environ,
    job_port,
    local_gpus,
    numbers,
    unexpected,
)
from scaletrain.cluster.discovery.membership import Membership


def detect(env: Environ) -> Membership | None:
    """Returns the membership of this task, None outside a step.

    A shell on an allocation has the variables of a job, not those of a step: it is
    one process, whose job has other tasks that nobody starts.

    Raises:
      ConfigError: variables that Slurm does not set like this.
    """
    names = ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID", "SLURM_STEP_ID")
    if "SLURM_STEP_NODELIST" not in env or names[0] not in env:
        return None
    tasks, task, job, step = numbers("Slurm", env, names)
    # The first name of lists such as node[001-004,7],other.
    nodes = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", env["SLURM_STEP_NODELIST"])
    return Membership(
        "Slurm",
        tasks,
        task,
        f"{nodes.split(',')[0]}:{job_port(f'{job}.{step}')}",
        None if "SLURM_GPUS_PER_TASK" in env else local_gpus(env, *_on_node(env)),
    )


def _on_node(env: Environ) -> tuple[int, int]:
    """Returns the number of this task on its node, and the count of tasks there."""
    local_id, node = numbers("Slurm", env, ("SLURM_LOCALID", "SLURM_NODEID"))
    counts = []
    for word in env.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", word)):
            raise unexpected("Slurm", "SLURM_STEP_TASKS_PER_NODE", word)
        counts += [int(match[1])] * int(match[2] or 1)
    if node >= len(counts):
        raise unexpected("Slurm", "SLURM_NODEID", str(node))
    return local_id, counts[node]
