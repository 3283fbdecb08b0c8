"""`scaletrain supervise`: the words after `--` are a training command."""

import argparse
import sys
from collections.abc import Iterator
from typing import NoReturn

from scaletrain.commands import options
from scaletrain.commands.command import Command
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = (
        "scaletrain supervise [--retries=N] -- train --config=... --workdir=..."
    )
    parser.add_argument(
        "--retries", type=options.whole_number, default=5,
        help="starts in a row without a new checkpoint (default: %(default)s)",
    )  # fmt: skip


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.retries < 0:
        yield f"--retries={args.retries}; below 0; give 0 or more."
    if args.words[:1] != ["train"]:
        first = " ".join(args.words[:1]) or "nothing"
        yield f"supervise; {first} after --; write -- train."


def _execute(run: RunConfig, args: argparse.Namespace) -> NoReturn:
    del run  # only checked: the child process reads it again
    from scaletrain import supervise

    supervisor = supervise.Supervisor(args.words, args.workdir, args.retries)
    sys.exit(supervisor.until_over())


COMMAND = Command(
    "a training command that is started again until it is over",
    _arguments,
    None,
    _execute,
    _problems,
)
