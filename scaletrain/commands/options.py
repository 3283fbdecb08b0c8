"""Options that several commands share, and the types of options."""

import argparse

from scaletrain import config

EXPERIMENT = "experiment file, with an argument for its get_config"


def experiment(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Adds --config."""
    words = "" if required else " (default: the settings in the workdir)"
    parser.add_argument(
        "--config", metavar="FILE[:ARG]", required=required, help=EXPERIMENT + words
    )


def workdir(parser: argparse.ArgumentParser) -> None:
    """Adds --workdir."""
    parser.add_argument(
        "--workdir", metavar="DIR", required=True, help="folder of the run"
    )


def step(parser: argparse.ArgumentParser) -> None:
    """Adds --step."""
    words = "step of the checkpoint (default: the newest)"
    parser.add_argument("--step", type=whole_number, help=words)


def processes(parser: argparse.ArgumentParser) -> None:
    """Adds the options by which processes connect to each other."""
    parser.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address of process 0"
    )
    parser.add_argument(
        "--num_processes",
        type=whole_number,
        help="number of processes, with --coordinator",
    )
    parser.add_argument(
        "--process_id", type=whole_number,
        help="number of this process from 0, with --coordinator",
    )  # fmt: skip
    parser.add_argument(
        "--heartbeat", type=float, default=100.0, metavar="SECONDS",
        help="silence after which a process is lost and all end (default: 100)",
    )  # fmt: skip


def whole_number(text: str) -> int:
    """Returns the whole number that `text` is, which may be written as 1e3."""
    try:
        return config.whole_number(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"{text}; not a whole number; give a whole number"
        ) from err


def ids(text: str) -> tuple[int, ...]:
    """Returns the ids of "1,2,3"."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"invalid ids {text!r}; give whole numbers with commas between"
        ) from err
