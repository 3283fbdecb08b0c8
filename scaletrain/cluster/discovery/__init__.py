"""Which processes a run has and which of them this one is.

    flags                    numbers given by a person; preferred to every launcher
    tpu  slurm  jobset  mpi  a launcher each, asked in the order of `LAUNCHERS`
    membership               the answer  (environment, metadata: sources of launchers)

Another launcher is a file with `detect(env)` and its line in `LAUNCHERS`.

Nothing in this room imports jax. Its own detection gives each task of Slurm one GPU,
however many the task has, and waits for tasks that an interactive shell never starts.
"""

import argparse
import dataclasses

from scaletrain.cluster.discovery import flags, jobset, mpi, slurm, tpu
from scaletrain.cluster.discovery.environment import Environ
from scaletrain.cluster.discovery.membership import Membership

__all__ = ["Membership", "discover"]

# The first that answers is right: GKE's TPU pods are pods of a JobSet too, and Slurm
# can start MPI's ranks.
LAUNCHERS = (tpu.detect, slurm.detect, jobset.detect, mpi.detect)


def discover(args: argparse.Namespace, env: Environ) -> Membership | None:
    """Returns the membership of this process, None where it is the only one.

    Raises:
      ConfigError: flags or an environment that contradict themselves.
    """
    membership = flags.detect(args)
    for detect in LAUNCHERS:
        membership = membership or detect(env)
    if membership is None:
        if args.coordinator:
            raise flags.incomplete()
        return None
    if args.coordinator:
        membership = dataclasses.replace(membership, coordinator=args.coordinator)
    membership.check()
    return membership if membership.num_processes > 1 else None
