"""The checks of the scripts in launch/ before they order machines.

    python -m scaletrain.preflight --topology=v5p:4x4x4 [--num_slices=N] -- OPTIONS

checks the options of `scaletrain train` against the slice and prints the cloud's names
for it, one `name=value` per line. --devices=N stands for N devices of any kind. A slice
with another number of chips than the mesh is refused before it costs money.
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


def check(run: RunConfig, name: str, devices: int) -> RunConfig:
    """Returns `run` resolved on a number of devices.

    Args:
      run: the settings.
      name: of the machines, for the message.
      devices: their number.

    Raises:
      ConfigError: the mesh has another number of devices, or cannot be split as set.
    """
    mesh_devices = run.mesh.num_devices
    if mesh_devices is not None and mesh_devices != devices:
        raise ConfigError(
            [
                f"{name}; {counted(devices, 'device')}, and the mesh has "
                f"{mesh_devices}; take as many, or set one axis of the mesh to -1."
            ]
        )
    return config.resolve(run, devices)


def check_slices(run: RunConfig, num_slices: int) -> None:
    """Raises ConfigError if the axes of `mesh.dcn` do not multiply to `num_slices`."""
    if run.mesh.num_slices != num_slices:
        raise ConfigError(
            [
                f"--num_slices={num_slices}; the axes of mesh.dcn multiply to "
                f"{run.mesh.num_slices}; give --config.mesh.dcn.data={num_slices}, "
                "or as many slices."
            ]
        )


def facts(slice_: Slice, args: argparse.Namespace) -> dict[str, str | int]:
    """Returns the cloud's names for a slice, and a name for the run on it.

    Raises:
      ConfigError: the slice has no TPUs, or `workdir` is not on a mounted disk.
    """
    problems = []
    tpu = slice_.chip.tpu
    if tpu is None:
        problems.append(
            f"--topology={slice_.name}; not a TPU slice; see launch/README.md."
        )
    if not args.workdir.startswith("/"):
        problems.append(
            f"--workdir={args.workdir}; no path that every worker sees and that "
            "outlives them; give the absolute path of a mounted file system."
        )
    if problems or tpu is None:
        raise ConfigError(problems)
    folder = args.workdir.rstrip("/").rpartition("/")[2].lower()
    return {
        # Clouds allow lower-case letters, digits and dashes, and limit the length.
        "name": "scaletrain-" + re.sub("[^a-z0-9]+", "-", folder)[:30].strip("-"),
        "config": config.file_and_argument(args.config)[0],
        "accelerator_type": clouds.accelerator_type(tpu, slice_.shape),
        "runtime": tpu.cloud.runtime,
        "accelerator": tpu.cloud.accelerator,
        "shape": "x".join(map(str, slice_.shape)),
        "default_shape": clouds.default_shape(tpu, slice_.shape),
        "hosts": slice_.hosts,
        "chips_per_host": slice_.chips // slice_.num_slices // slice_.hosts,
    }


def read(argv: list[str]) -> tuple[Slice | None, argparse.Namespace]:
    """Returns the slice, None for --devices, and the options of `train`, all checked.

    Raises:
      ConfigError: options, settings and slice do not fit together.
    """
    end = argv.index("--")
    parser = argparse.ArgumentParser(prog="scaletrain.preflight", allow_abbrev=False)
    parser.add_argument("--topology", default="")
    parser.add_argument("--num_slices", type=int, default=1)
    parser.add_argument("--devices", type=int, default=0)
    args = parser.parse_args(argv[:end])
    train_args, run = line.read(["train", *argv[end + 1 :]])
    if args.devices:
        check(run, "this allocation", args.devices)
        return None, train_args
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
    return slice_, train_args


def main() -> None:
    """Prints the facts of the command line's slice, or the error that refuses it."""
    try:
        slice_, train_args = read(sys.argv[1:])
        printed = facts(slice_, train_args) if slice_ else {}
    except ScaletrainError as err:
        print(f"scaletrain: {err}", file=sys.stderr)
        sys.exit(err.exit_code)
    for name, value in printed.items():
        print(f"{name}={value}")


if __name__ == "__main__":
    main()
