"""`scaletrain import`."""

import argparse

from scaletrain.commands import options
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="DIR", required=True,
        help="folder with config.json and safetensors",
    )  # fmt: skip
    options.workdir(parser)


def _settings(args: argparse.Namespace) -> RunConfig:
    return RunConfig()  # the settings come from the imported config.json


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    del run
    from scaletrain.hf import importer

    record = importer.import_checkpoint(args.source, args.workdir, args.overrides)
    return Result(record, importer.in_words(record))


COMMAND = Command(
    "a Hugging Face checkpoint folder becomes a run", _arguments, _settings, _execute
)
