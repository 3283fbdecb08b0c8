"""The parts of a command, and its result."""

import argparse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from scaletrain.config import RunConfig


class Result(NamedTuple):
    """The result of a command, for machines and for people."""

    record: Any  # printed with --json
    text: str
    interrupted: bool = False  # whether Ctrl-C ended it early


def _no_problems(args: argparse.Namespace) -> Iterable[str]:
    return ()


class Command(NamedTuple):
    """A command of `scaletrain`."""

    help: str  # one line
    add_arguments: Callable[[argparse.ArgumentParser], None]
    # Returns checked settings, see `settings`; None: those of the command after `--`.
    settings: Callable[[argparse.Namespace], RunConfig] | None
    execute: Callable[[RunConfig, argparse.Namespace], Result]
    problems: Callable[[argparse.Namespace], Iterable[str]] = _no_problems  # of options
