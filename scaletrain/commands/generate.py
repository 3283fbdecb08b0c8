"""`scaletrain generate`."""

import argparse

from scaletrain.commands import options, settings
from scaletrain.commands.command import Command, Result
from scaletrain.config import RunConfig


def _arguments(parser: argparse.ArgumentParser) -> None:
    options.experiment(parser, required=False)
    options.workdir(parser)
    options.step(parser)
    parser.add_argument(
        "--prompt", action="append", help="start of the text; repeat for a batch"
    )
    parser.add_argument(
        "--prompt_ids", action="append", type=options.ids, metavar="1,2,3",
        help="the same as token ids, to which nothing is added",
    )  # fmt: skip
    for name, kind, value, words in (
        ("max_new_tokens", options.whole_number, 128, "most tokens of the answer"),
        ("temperature", float, 0.8, "divides the logits; 0 = greedy"),
        ("top_k", options.whole_number, 0, "draw from the k likeliest, 0 = all tokens"),
        ("top_p", float, 1.0, "draw from this much probability, 1 = all tokens"),
        ("seed", options.whole_number, 0, "seed of the sampling"),
    ):
        words += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=kind, default=value, help=words)


def _execute(run: RunConfig, args: argparse.Namespace) -> Result:
    from scaletrain import generate

    sampling = generate.Sampling(
        args.temperature, args.top_k, args.top_p, args.max_new_tokens
    )
    prompts = [*(args.prompt or ()), *(args.prompt_ids or ())] or [""]
    texts = generate.generate_texts(
        run, args.workdir, args.step, prompts, sampling, args.seed
    )
    return Result(texts, "\n\n".join(map(generate.in_words, texts)))


COMMAND = Command("text from a checkpoint", _arguments, settings.of_workdir, _execute)
