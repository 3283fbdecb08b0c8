"""`scaletrain config`."""

import argparse
import json

from scaletrain import config
from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=True)


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    import jax

    from scaletrain import mesh, sharding
    from scaletrain.program import build

    run = config.resolve(run, config.mesh_size(run.mesh) or jax.device_count())
    devices = mesh.abstract(run.mesh)
    with jax.sharding.use_abstract_mesh(devices):
        table = sharding.table(build(run, devices).state.params)
    text = config.to_json(run)
    return Result(json.loads(text), f"{text}\n{table}")


COMMAND = Command(
    "the resolved settings and the sharding table",
    _arguments,
    settings.of_experiment,
    _execute,
)
