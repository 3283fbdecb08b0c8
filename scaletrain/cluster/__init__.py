"""The processes of a run: they find each other, agree, and end together.

Promise: a run of several processes behaves like one. If one of them is lost or fails,
all others end, and each prints which one it was. A run of one process does none of it.

    processes   what the rest of scaletrain asks: join, gather, decide, leave, ...
    discovery   which processes there are and which this is: flags or a launcher
    rendezvous  all connect to process 0  (connection: JSON messages over TCP)
    liveness    heartbeats, losses and gathers  (gathering: which values have come)
    agreement   facts that must be the same in all processes  (version: of the code)
    crashes     delays of this process's end, so that a loss is named first
    signals     requests to stop, in this process

What is imported here is all that the rest of scaletrain uses, with `signals`. The
messages and timeouts are described in docs/internals/cluster.md.
"""

from scaletrain.cluster.processes import (
    agree,
    decide,
    gather,
    in_turns,
    join,
    lead,
    leave,
    stopped_since,
    wait,
)
from scaletrain.cluster.version import code_version

__all__ = [
    "agree",
    "code_version",
    "decide",
    "gather",
    "in_turns",
    "join",
    "lead",
    "leave",
    "stopped_since",
    "wait",
]
