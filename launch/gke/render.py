"""Prints the JobSet of a run on GKE's TPU slices, as JSON, for jobset.sh."""

import argparse
import json
import sys
from typing import Any

from scaletrain import preflight
from scaletrain.errors import ConfigError, ScaletrainError

_RESTARTS = 100  # of a run in all; a preemption is one
_GRACE_S = 600  # to save in, where the node is not taken away sooner
_PORTS = (8471, 8080)  # the TPU runtime's, the slices'

_JOB_INDEX = "metadata.labels['jobset.sigs.k8s.io/job-index']"


def jobset(slice_: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    """Returns the manifest; a slice is a Job, a host a pod."""
    name = args.name or slice_["name"]
    pods = slice_["hosts"]
    job = {
        "completionMode": "Indexed",
        "parallelism": pods,
        "completions": pods,
        "backoffLimit": 0,  # pods of a slice start again together or not at all
        # 1 failed and 2 refused would do so again. Whatever else ends a pod (75, a
        # signal, a lost node) starts all slices again.
        "podFailurePolicy": {
            "rules": [
                {
                    "action": "FailJob",
                    "onExitCodes": {
                        "containerName": "train",
                        "operator": "In",
                        "values": [1, 2],
                    },
                }
            ]
        },
        "template": {
            "metadata": {"labels": {"app": "scaletrain"}},
            "spec": _pod(slice_, args),
        },
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {
            "name": name,
            "annotations": {
                # a node pool is a slice: no two Jobs share one
                "alpha.jobset.sigs.k8s.io/exclusive-topology": (
                    "cloud.google.com/gke-nodepool"
                )
            },
        },
        "spec": {
            "failurePolicy": {
                "maxRestarts": _RESTARTS,
                "restartStrategy": "BlockingRecreate",  # attempts do not overlap
                "rules": [
                    {
                        "name": "ended",
                        "action": "FailJobSet",
                        "onJobFailureReasons": ["PodFailurePolicy"],
                    }
                ],
            },
            "replicatedJobs": [
                {
                    "name": "slice",
                    "replicas": args.num_slices,
                    "template": {"spec": job},
                }
            ],
        },
    }


def _pod(slice_: dict[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    chips = {"google.com/tpu": slice_["chips_per_host"]}
    nodes = {
        "cloud.google.com/gke-tpu-accelerator": slice_["accelerator"],
        "cloud.google.com/gke-tpu-topology": slice_["shape"],
    }
    spot = "cloud.google.com/gke-spot"
    tolerations = []
    if args.spot:
        nodes[spot] = "true"
        tolerations.append(
            {"key": spot, "operator": "Equal", "value": "true", "effect": "NoSchedule"}
        )
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _GRACE_S,
        "hostNetwork": True,  # slices talk at the machine's own speed
        "dnsPolicy": "ClusterFirstWithHostNet",
        "nodeSelector": nodes,
        "tolerations": tolerations,
        "containers": [
            {
                "name": "train",
                "image": args.image,
                # Kubernetes would read $(NAME), and $$ as $
                "command": [
                    "scaletrain",
                    "train",
                    *(word.replace("$", "$$") for word in args.train),
                ],
                "env": _env(slice_, args),
                "ports": [{"containerPort": port} for port in _PORTS],
                "resources": {"requests": chips, "limits": chips},
                "volumeMounts": [{"name": "shared", "mountPath": args.mount}],
            }
        ],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": args.claim}}
        ],
    }


def _env(slice_: dict[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns what tells pods of each other, where the cluster does not."""
    said = {
        "JOBSET_NAME": args.name or slice_["name"],
        "REPLICATED_JOB_NAME": "slice",
        "NUM_JOBS": str(args.num_slices),
        "PODS_PER_JOB": str(slice_["hosts"]),
    }
    return [
        *({"name": name, "value": value} for name, value in said.items()),
        {"name": "JOB_INDEX", "valueFrom": {"fieldRef": {"fieldPath": _JOB_INDEX}}},
    ]


def read(argv: list[str]) -> tuple[dict[str, Any], argparse.Namespace]:
    """Returns the facts of the slice and the options.

    Raises:
      ConfigError: they do not fit together.
    """
    parser = argparse.ArgumentParser(prog="jobset.sh", allow_abbrev=False)
    parser.add_argument("--topology", required=True)
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--image", required=True)
    parser.add_argument("--claim", required=True)
    parser.add_argument("--mount", default="/shared")
    parser.add_argument("--name", default="")
    parser.add_argument("--spot", action="store_true")
    end = argv.index("--")
    args = parser.parse_args(argv[:end])
    args.train = argv[end + 1 :]
    where = [f"--topology={args.topology}", f"--num_slices={args.num_slices}"]
    slice_, given = preflight.read([*where, "--", *args.train])
    assert slice_ is not None, "a topology is named"
    facts = preflight.facts(slice_, given)
    problems = []
    if args.num_slices > 1 and slice_.hosts == 1:
        problems.append(
            f"--num_slices={args.num_slices}; GKE joins slices of several hosts and "
            f"{args.topology} is one; take a larger slice, or tpu_vm.sh."
        )
    if not f"{given.workdir}/".startswith(args.mount.rstrip("/") + "/"):
        problems.append(
            f"--workdir={given.workdir}; not under --mount={args.mount}, and a pod's "
            "own disk goes with the pod; give a folder there."
        )
    if problems:
        raise ConfigError(problems)
    return facts, args


def main() -> None:
    """Prints the manifest of the command line, or why there is none."""
    try:
        found = jobset(*read(sys.argv[1:]))
    except ScaletrainError as err:
        print(f"scaletrain: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
