"""The comparison of facts that must be the same in all processes."""

import json
from collections.abc import Mapping

from scaletrain.cluster.liveness import Peers
from scaletrain.errors import ClusterError

_MAX_LINES = 20  # of differences in an error


def agree(peers: Peers, facts: Mapping[str, object]) -> None:
    """Compares facts by name with those of process 0, in all processes at once.

    Raises:
      ClusterError: in every process, with everything that differs in any of them.
    """
    own = {name: str(value) for name, value in facts.items()}
    first = json.loads(
        peers.gather("facts", json.dumps(own) if peers.process_id == 0 else "")[0]
    )
    differences = [
        f"{name} is {own.get(name)}, in process 0 {first.get(name)}"
        for name in first | own
        if own.get(name) != first.get(name)
    ]
    answers = peers.gather("differences", json.dumps(differences))
    problems = [
        f"  process {peers.name(i)}: {line}"
        for i, answer in enumerate(answers)
        for line in json.loads(answer)
    ]
    if problems:
        listed = "\n".join(problems[:_MAX_LINES])
        raise ClusterError(
            f"the processes do not agree:\n{listed}\n"
            "start all of them with the same command, code and data."
        )
