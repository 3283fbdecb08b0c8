"""`scaletrain train`."""

import argparse

from scaletrain.cluster import signals
from scaletrain.commands import options, process, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig
from scaletrain.monitor.phase_clock import Phases


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=True)
    options.workdir(parser)
    options.processes(parser)


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    signals.catch()
    phases = Phases()
    with signals.at_once(), phases("start"):
        process.join(run, args)
        process.keep_compiled(args.workdir)
        from scaletrain import evaluate, train
    record = train.train(run, args.workdir, phases)
    words = evaluate.in_words(record)
    return Result(record, f"step {record['step']}: validation {words}")


COMMAND = Command(
    "train, or go on training, in a workdir",
    _arguments,
    settings.of_experiment,
    _execute,
)
