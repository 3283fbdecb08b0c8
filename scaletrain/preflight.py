"""What the scripts in launch/ ask before they order machines.

    python -m scaletrain.preflight --topology=v5p:4x4x4 [--num_slices=N] -- OPTIONS

checks the options of `scaletrain train` against the slice and prints what the cloud
calls it, a `name=value` a line. --devices=N stands for N devices of any kind. A slice
whose chips are not the mesh's is refused here, before anything is paid for.
"""

import argparse
import re
import sys

from scaletrain import config
from scaletrain.commands import line
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError, ScaletrainError, counted
from scaletrain.hardware import clouds, slices
from scaletrain.hardware.slices import Slice


def check(run: RunConfig, where: str, devices: int) -> RunConfig:
    """Returns `run` on the `devices` of `where`.

    Raises:
      ConfigError: the mesh is larger or smaller, or cannot be split as asked.
    """
    asked = run.mesh.num_devices
    if asked is not None and asked != devices:
        raise ConfigError(
            [
                f"{where}; {counted(devices, 'device')}, and the mesh has {asked}; "
                "take as many, or set one axis of the mesh to -1."
            ]
        )
    return config.resolve(run, devices)


def check_slices(run: RunConfig, num_slices: int) -> None:
    """Refuses a mesh that crosses slices where there are none, or the reverse.

    Raises:
      ConfigError: the axes of `mesh.dcn` do not multiply to `num_slices`.
    """
    if run.mesh.num_slices != num_slices:
        raise ConfigError(
            [
                f"--num_slices={num_slices}; the axes of mesh.dcn multiply to "
                f"{run.mesh.num_slices}; give --config.mesh.dcn.data={num_slices}, "
                "or as many slices."
            ]
        )


def facts(slice_: Slice, given: argparse.Namespace) -> dict[str, str | int]:
    """Returns what the cloud calls a slice, and a name for the run on it.

    Raises:
      ConfigError: it is not a TPU slice, or `workdir` is on no disk that outlives it.
    """
    problems = []
    tpu = slice_.chip.tpu
    if tpu is None:
        problems.append(
            f"--topology={slice_.name}; not a TPU slice; see launch/README.md."
        )
    if not given.workdir.startswith("/"):
        problems.append(
            f"--workdir={given.workdir}; no path that every worker sees and that "
            "outlives them; give the absolute path of a mounted file system."
        )
    if problems or tpu is None:
        raise ConfigError(problems)
    last = given.workdir.rstrip("/").rpartition("/")[2].lower()
    return {
        "name": "scaletrain-" + re.sub("[^a-z0-9]+", "-", last)[:30].strip("-"),
        "config": config.file_and_argument(given.config)[0],
        "accelerator_type": clouds.accelerator_type(tpu, slice_.shape),
        "runtime": tpu.cloud.runtime,
        "accelerator": tpu.cloud.accelerator,
        "shape": "x".join(map(str, slice_.shape)),
        "default_shape": clouds.default_shape(tpu, slice_.shape),
        "hosts": slice_.hosts,
        "chips_per_host": slice_.chips // slice_.num_slices // slice_.hosts,
    }


def read(argv: list[str]) -> tuple[Slice | None, argparse.Namespace]:
    """Returns the slice, if one is named, and the options of `train`, all checked.

    Raises:
      ConfigError: options, settings and slice do not fit together.
    """
    end = argv.index("--")
    parser = argparse.ArgumentParser(prog="scaletrain.preflight", allow_abbrev=False)
    parser.add_argument("--topology", default="")
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--devices", type=int, default=0)
    args = parser.parse_args(argv[:end])
    given, run = line.read(["train", *argv[end + 1 :]])
    if args.devices:
        check(run, "this allocation", args.devices)
        return None, given
    for word in argv[end + 1 :]:
        if word.startswith(("--workdir=~", "~")):
            raise ConfigError(
                [
                    f"{word}; a home that goes with the machines; give the absolute "
                    "path of a mounted file system."
                ]
            )
    slice_ = slices.parse(args.topology, args.num_slices)
    across = f" --num_slices={args.num_slices}" if args.num_slices > 1 else ""
    run = check(run, f"--topology={args.topology}{across}", slice_.devices)
    check_slices(run, args.num_slices)
    return slice_, given


def main() -> None:
    """Prints the facts of the command line's slice, or why it is refused."""
    try:
        slice_, given = read(sys.argv[1:])
        found = facts(slice_, given) if slice_ else {}
    except ScaletrainError as err:
        print(f"scaletrain: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    for name, value in found.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
