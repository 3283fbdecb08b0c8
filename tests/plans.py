"""Every experiment that names a slice, planned to machine code; writes docs/plans.md.

    python tests/plans.py [NAME ...]

The memory that a plan foretells is where the compiler placed the buffers; that of the
executable is what it says of itself, once it exists. NAME ... makes the rows of those
experiments anew and keeps the others.
"""

import importlib.metadata
import pathlib
import resource
import sys
import time

from scaletrain import config
from scaletrain.hardware import slices
from scaletrain.plan import command, compiler

ROOT = pathlib.Path(__file__).parent.parent
SLICES = (
    ("gpt2_124m.py", "v5e:2x2", {}),
    ("llama_1b.py:synthetic", "v6e:2x2", {}),
    ("llama3_8b.py", "v5p:4x4x4", {}),
    ("llama3_8b.py", "tpu7x:4x4x4", {"mesh.fsdp": 128, "accumulate_steps": 1}),
    ("llama3_70b.py", "v5p:8x8x8", {}),
)


def resolved(experiment, topology, overrides):
    """Returns an experiment's run for a slice, and the slice."""
    slice_ = slices.parse(topology)
    run = config.load(str(ROOT / "experiments" / experiment))
    return command.resolved(config.applied(run, overrides), slice_), slice_


def main():
    """Plans every pair both ways, or those asked for, and writes the table."""
    path = ROOT / "docs" / "plans.md"
    asked, before = sys.argv[1:], path.read_text(encoding="utf-8").splitlines()
    lines = []
    for experiment, topology, overrides in SLICES:
        words = " ".join([experiment, *config.flags(overrides)])
        head = f"| `{words}` | {topology} |"
        if asked and experiment not in asked:
            lines += [line for line in before if line.startswith(head)]
            continue
        run, slice_ = resolved(experiment, topology, overrides)
        began = time.monotonic()
        quick = compiler.compile(run, slice_)
        middle = time.monotonic()
        whole = compiler.compile(run, slice_, full=True)
        ended = time.monotonic()
        lines.append(
            f"{head} {'yes' if whole.fits else 'no'} | "
            f"{quick.peak_bytes / 2**30:.2f} | {whole.executable_bytes / 2**30:.2f} | "
            f"{quick.peak_bytes / whole.executable_bytes - 1:+.1%} | "
            f"{whole.live_bytes / 2**30:.2f} | "
            f"{quick.step.seconds:.2f} | {middle - began:.0f} | {ended - middle:.0f} |"
        )
        print(lines[-1], flush=True)
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    text = f"""# Plans of the experiments

Made by `make plan-all` with libtpu {importlib.metadata.version("libtpu")}. "planned" is
the memory in GiB of `scaletrain plan`, which stops once buffers are placed; "executable"
that of the same step compiled to machine code, by its own account: its arguments and the
one block of memory that its temporaries are placed in. "in use" is the most of that which
is used at once; what lies unused between buffers must be there all the same. The largest
compiler process held {largest:.1f} GiB.

| experiment | slice | fits | planned | executable | differ | in use | step s | planned in s | compiled in s |
|---|---|---|---|---|---|---|---|---|---|
""" + "\n".join(lines)  # noqa: E501
    path.write_text(text + "\n", encoding="utf-8")
    return 0 if all("| yes |" in line for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
