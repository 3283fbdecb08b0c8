"""`scaletrain bench`."""

import argparse
from collections.abc import Iterator

from scaletrain.commands import options, process, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=True)
    parser.add_argument(
        "--steps", type=options.whole_number, default=20,
        help="number of timed steps (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--data", action="store_true", help="read the settings' data (default: random)"
    )
    parser.add_argument(
        "--profile", action="store_true", help="say where the time went, with a trace"
    )
    parser.add_argument(
        "--sweep", action="store_true", help="try attention, layers, remat and batches"
    )
    parser.add_argument(
        "--workdir", metavar="DIR", default="",
        help="folder of the trace (default: temporary)",
    )  # fmt: skip
    options.processes(parser)


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.steps < 1:
        yield f"--steps={args.steps}; below 1; give 1 or more."
    if args.workdir and not args.profile:
        yield f"--workdir={args.workdir}; no effect without --profile; give both."


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    process.join(run, args)
    from scaletrain import bench

    record = bench.benchmark(run, bench.request(args))
    return Result(record, bench.in_words(record))


COMMAND = Command(
    "speed of the step here, and what the hardware could do",
    _arguments,
    settings.of_experiment,
    _execute,
    _problems,
)
