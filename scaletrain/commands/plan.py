"""`scaletrain plan`."""

import argparse

from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=True)
    parser.add_argument(
        "--topology", metavar="SLICE", help="such as v5p:4x4x4, v6e-256 or h100:8"
    )
    parser.add_argument("--topologies", metavar="A,B", help="several, to be compared")
    parser.add_argument(
        "--num_slices", type=options.whole_number, default=1,
        help="number of slices, connected by DCN (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--search", action="store_true", help="propose mesh, accumulation and remat"
    )
    parser.add_argument(
        "--full", action="store_true", help="compile to machine code (minutes)"
    )
    parser.add_argument(
        "--tokens", type=float, default=0.0,
        help="tokens whose cost is computed (default: those of num_steps)",
    )  # fmt: skip
    parser.add_argument("--region", help="region of the grid, for its carbon")
    for name, words in (
        ("price_per_chip_hour", "US dollars"),
        ("watts_per_chip", "with the chip's share of its host"),
        ("pue", "energy of the site / energy of the machines"),
        ("grid_g_per_kwh", "grams of CO2 equivalent"),
    ):
        parser.add_argument(f"--{name}", type=float, help=f"{words} (default: a table)")


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    from scaletrain.plan import command, report

    record = command.plan(run, command.request(args))
    return Result(record, report.in_words(record), record["interrupted"])


COMMAND = Command(
    "memory, time and cost of a run on a slice that is not here",
    _arguments,
    settings.of_experiment,
    _execute,
)
