"""`scaletrain export`."""

import argparse

from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=False)
    options.workdir(parser)
    options.step(parser)
    parser.add_argument("--to", metavar="DIR", required=True, help="folder to be made")
    parser.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="",
        help="format of the tensors (default: as they are stored)",
    )  # fmt: skip
    parser.add_argument(
        "--merge", action="store_true",
        help="add adapters to the weights (default: export them alone)",
    )  # fmt: skip


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    from scaletrain.hf import exporter

    record = exporter.export_checkpoint(
        run, args.workdir, args.to, args.step, args.dtype, merge=args.merge
    )
    return Result(record, exporter.in_words(record))


COMMAND = Command(
    "a run becomes a Hugging Face checkpoint folder",
    _arguments,
    settings.of_workdir,
    _execute,
)
