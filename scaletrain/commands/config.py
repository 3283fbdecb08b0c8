"""`scaletrain config`."""

import argparse
import json
from collections.abc import Iterator

from scaletrain import config
from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig, explain


def _arguments(parser: argparse.ArgumentParser) -> None:
    either = parser.add_mutually_exclusive_group(required=True)
    either.add_argument("--config", metavar="FILE[:ARG]", help=options.EXPERIMENT)
    either.add_argument(
        "--explain", metavar="PATH", nargs="?", const="",
        help="the meaning of a setting, of a group of them, or of all",
    )  # fmt: skip


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.explain is not None:
        for path, text in args.overrides:
            yield (
                f"--config.{path}={text}; no effect with --explain; leave one of them "
                "out."
            )


def _settings(args: argparse.Namespace) -> RunConfig:
    if args.explain is not None:
        return RunConfig()
    return settings.of_experiment(args)


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    if args.explain is not None:
        stories = explain.stories(args.explain)
        return Result(stories, explain.in_words(stories))
    import jax

    from scaletrain import mesh, sharding
    from scaletrain.program import build

    run = config.resolve(run, run.mesh.num_devices or jax.device_count())
    devices = mesh.abstract(run.mesh)
    with jax.sharding.use_abstract_mesh(devices):
        table = sharding.table(build(run, devices).state.params)
    text = config.to_json(run)
    return Result(json.loads(text), f"{text}\n{table}")


COMMAND = Command(
    "the resolved settings and the sharding table",
    _arguments,
    _settings,
    _execute,
    _problems,
)
