"""The settings that a command works with, from its options."""

import argparse
import dataclasses

from scaletrain import config, paths
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError
from scaletrain.workdir import Workdir


def of_experiment(args: argparse.Namespace) -> RunConfig:
    """Returns the settings of --config and the overrides.

    Raises:
      ConfigError: with every problem of both.
    """
    if paths.is_url(args.config):  # `line.read` reports it as a problem
        return RunConfig()
    return config.load(args.config, args.overrides)


def of_workdir(args: argparse.Namespace) -> RunConfig:
    """Returns the settings of --config or, without it, those of the workdir.

    The mesh is all devices of this machine (fsdp), unless an override sets a mesh axis.

    Raises:
      ConfigError: with every problem of them.
    """
    if args.config:
        return of_experiment(args)
    if paths.is_url(args.workdir):  # `line.read` reports it as a problem
        return RunConfig()
    run = config.load(_settings_file(args.workdir), args.overrides)
    if any(path.startswith("mesh.") for path, _ in args.overrides):
        return run
    return dataclasses.replace(run, mesh=config.MeshConfig(fsdp=-1))


def _settings_file(workdir: str) -> str:
    path = Workdir.of(workdir).config
    if not path.is_file():
        raise ConfigError(
            [
                f"--workdir={workdir}; no config.json there; "
                "give the workdir of a run that `scaletrain train` started."
            ]
        )
    return str(path)
