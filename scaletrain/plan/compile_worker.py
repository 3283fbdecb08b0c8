"""The process that compiles the train step for a slice this machine does not have.

    python -m scaletrain.plan.compile_worker FOLDER

FOLDER holds `request.json`; the process writes the compiler's dump into it and, last,
`answer.json`. There is no public way to stop a compilation before machine code is
generated, which is nine tenths of its time: the process ends itself once the buffers
are assigned.
"""

import json
import os
import pathlib
import sys
import threading
import time
from typing import Any

from scaletrain.files import atomic_write

# The compiler writes this file last before it generates code.
ASSIGNED = "*jit_train_step*after_optimizations_after_buffer_assignment.txt"


def main() -> None:
    """Compiles the request in the folder that the command line names."""
    folder = pathlib.Path(sys.argv[1])
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    planner = request["planner"]
    threading.Thread(target=_follow, args=(folder, planner), daemon=True).start()
    program, facts = described(request)
    if not request["full"]:
        watch = threading.Thread(target=_stop, args=(folder, facts), daemon=True)
        watch.start()
    import jax

    from scaletrain import compilation

    try:
        with jax.set_mesh(program.mesh):
            memory = compilation.compiled(program).memory_analysis()
        facts["executable_bytes"] = (
            memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes
            + memory.temp_size_in_bytes
        )
        host = memory.host_temp_size_in_bytes
        facts["live_bytes"] = memory.peak_memory_in_bytes - host
    except Exception as err:  # the compiler raises nothing narrower
        facts["error"] = str(err)
    _answer(folder, facts)


def described(request: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns the step's program for the slice, and facts about its state.

    The facts are the number of parameters, the bytes of the state on a device, and the
    names of the matrices by shape.
    """
    import jax
    from jax.experimental import topologies

    from scaletrain import config, mesh, sharding
    from scaletrain.program import build

    slice_ = topologies.get_topology_desc(
        topology_name=request["topology"],
        platform=request["platform"],
        **request["kwargs"],
    )
    run = config.resolve(config.from_json(request["config"]), len(slice_.devices))
    program = build(run, mesh.build(run.mesh, slice_.devices))
    state = program.state
    facts = {
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.weights)),
        "bytes": {
            "parameters": sharding.nbytes(state.weights),
            "optimizer": sharding.nbytes(state.opt_state),
            "gradients": sharding.nbytes(state.params),
        },
        "shapes": shapes(state.weights),
    }
    return program, facts


def shapes(weights: Any) -> dict[str, str]:
    """Returns the names of the matrices of each shape, such as 2048,8192.

    A matrix counts under its global shape and under that of its shard on a device.
    """
    import jax

    names: dict[str, set[str]] = {}
    for path, leaf in jax.tree.leaves_with_path(weights):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        for shape in (leaf.shape, leaf.sharding.shard_shape(leaf.shape)):
            if len(shape) > 1:
                names.setdefault(",".join(map(str, shape)), set()).add(name)
    return {shape: " or ".join(sorted(each)) for shape, each in names.items()}


def _follow(folder: pathlib.Path, planner: int) -> None:
    """Removes the folder and ends the process once the planner's process has ended."""
    while os.getppid() == planner:
        time.sleep(0.5)
    # `rm` replaces this process, so that the compiler writes no more files.
    os.execlp("rm", "rm", "-rf", str(folder))


def _stop(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Ends the process as soon as the compiler has written its buffer assignment."""
    size = -1
    while True:
        time.sleep(0.05)
        paths = list(folder.glob(ASSIGNED))
        # The file is written in pieces: it is complete when it has stopped growing.
        if paths and paths[0].stat().st_size == size > 0:
            _answer(folder, facts)
        size = paths[0].stat().st_size if paths else -1


def _answer(folder: pathlib.Path, facts: dict[str, Any]) -> None:
    """Writes the answer and ends the process, whichever thread calls this first."""
    atomic_write(folder / "answer.json", json.dumps(facts).encode())
    os._exit(0)


if __name__ == "__main__":
    main()
