"""`scaletrain eval`."""

import argparse
from collections.abc import Iterator

from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=False)
    options.workdir(parser)
    options.step(parser)
    parser.add_argument(
        "--split", choices=("validation", "train"), default="validation",
        help="split of the documents (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", metavar="FILE.npy", help="score these ids [B, T] in float32 instead"
    )
    parser.add_argument(
        "--save_logits", metavar="OUT.npy", help="with --tokens: float32 [B, T, V]"
    )


def _problems(args: argparse.Namespace) -> Iterator[str]:
    if args.save_logits and not args.tokens:
        yield (
            f"--save_logits={args.save_logits}; no effect without --tokens; "
            "give ids in --tokens."
        )


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    if args.tokens:
        from scaletrain.score import score

        record = score(run, args.workdir, args.step, args.tokens, args.save_logits)
        return Result(record, f"step {record['step']}: loss {record['loss']:.6f}")
    from scaletrain import evaluate

    record = evaluate.evaluate_checkpoint(run, args.workdir, args.step, args.split)
    words = evaluate.in_words(record)
    return Result(record, f"step {record['step']}: {args.split} {words}")


COMMAND = Command(
    "loss, perplexity and bits per byte of a checkpoint",
    _arguments,
    settings.of_workdir,
    _execute,
    _problems,
)
