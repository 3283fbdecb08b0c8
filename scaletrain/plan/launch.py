"""The command line that starts a planned run on its devices."""

import shlex
from collections.abc import Sequence

from scaletrain import config
from scaletrain.hardware import clouds
from scaletrain.hardware.slices import Slice


def command(
    spec: str,
    given: Sequence[tuple[str, str]],
    overrides: config.Overrides,
    slice_: Slice,
) -> str:
    """Returns the line to run, quoted for a shell.

    Args:
      given: (path, text) of the overrides that the plan was asked with.
      overrides: those that it chose; they replace the given ones.
    """
    kept = [f"--config.{path}={text}" for path, text in given if path not in overrides]
    words = [f"--config={spec}", "--workdir=WORKDIR", *kept, *config.flags(overrides)]
    return shlex.join([*_starter(slice_), *words])


def _starter(slice_: Slice) -> list[str]:
    """Returns what starts a process on each of the slice's hosts."""
    if tpu := slice_.chip.tpu:
        slices = [f"--num_slices={slice_.num_slices}"] * (slice_.num_slices > 1)
        words = [f"--topology={slice_.name}", *slices]
        if clouds.on_vms(tpu, slice_.shape):
            return ["launch/tpu_vm.sh", *words, "--"]
        pods = ["--image=IMAGE", "--claim=CLAIM"]
        return ["launch/gke/jobset.sh", *words, *pods, "--"]
    if slice_.hosts > 1:
        return ["sbatch", f"--nodes={slice_.hosts}", "launch/slurm.sbatch"]
    return ["scaletrain", "train"]
