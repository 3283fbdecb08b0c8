"""The command line: words to a command, its arguments and checked settings.

Nothing here imports jax, so that help and refusals are immediate.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, NoReturn

import scaletrain
from scaletrain import config
from scaletrain.errors import ConfigError
from scaletrain.workdir import Workdir

_EPILOG = """\
settings: --config.a.b=value overrides any setting, as in --config.num_steps=50
exit codes: 0 done, 1 the run failed, 2 the request cannot be honoured,
            75 interrupted, saved, start me again
"""


class _Parser(argparse.ArgumentParser):
    """Speaks of mistakes the way settings do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError([f"{message}; see `{self.prog} --help`."])


def _parser() -> _Parser:
    shape: dict[str, Any] = {
        "allow_abbrev": False,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "epilog": _EPILOG,
    }
    parser = _Parser(prog="scaletrain", description=scaletrain.__doc__, **shape)
    parser.add_argument("--version", action="version", version=scaletrain.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, words: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=words, description=words, **shape)
        sub.add_argument("--json", action="store_true", help="print results as JSON")
        return sub

    def experiment(sub: argparse.ArgumentParser, *, required: bool) -> None:
        words = "experiment file, with an argument for its get_config"
        if not required:
            words += " (default: the settings in the workdir)"
        sub.add_argument(
            "--config", metavar="FILE[:ARG]", required=required, help=words
        )

    def workdir(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "--workdir", metavar="DIR", required=True, help="folder of the run"
        )

    def step(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--step", type=int, help="checkpoint (default: the newest)")

    def processes(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--coordinator", metavar="HOST:PORT", help="of process 0")
        sub.add_argument("--num_processes", type=int, help="with --coordinator")
        sub.add_argument("--process_id", type=int, help="with --coordinator, from 0")
        sub.add_argument(
            "--heartbeat", type=float, default=100.0, metavar="SECONDS",
            help="silence after which a process is lost and all end (default: 100)",
        )  # fmt: skip

    train = command("train", "train, or go on training, in a workdir")
    experiment(train, required=True)
    workdir(train)
    processes(train)

    words = "a training command that is started again until it is over"
    again = commands.add_parser("supervise", help=words, description=words, **shape)
    again.usage = (
        "scaletrain supervise [--retries=N] -- train --config=... --workdir=..."
    )
    again.add_argument(
        "--retries", type=int, default=5, help="in a row without a new checkpoint"
    )

    evaluate = command("eval", "loss, perplexity and bits per byte of a checkpoint")
    experiment(evaluate, required=False)
    workdir(evaluate)
    step(evaluate)
    evaluate.add_argument(
        "--split", choices=("validation", "train"), default="validation"
    )
    evaluate.add_argument(
        "--tokens", metavar="FILE.npy", help="score these ids [B, T] in float32 instead"
    )
    evaluate.add_argument(
        "--save_logits", metavar="OUT.npy", help="with --tokens: float32 [B, T, V]"
    )

    generate = command("generate", "text from a checkpoint")
    experiment(generate, required=False)
    workdir(generate)
    step(generate)
    generate.add_argument(
        "--prompt", action="append", help="start of the text; repeat for a batch"
    )
    generate.add_argument(
        "--prompt_ids", action="append", type=_numbers, metavar="1,2,3",
        help="the same as token ids, to which nothing is added",
    )  # fmt: skip
    generate.add_argument("--max_new_tokens", type=int, default=128)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 = greedy")
    generate.add_argument("--top_k", type=int, default=0, help="0 = all tokens")
    generate.add_argument("--top_p", type=float, default=1.0, help="1 = all tokens")
    generate.add_argument("--seed", type=int, default=0, help="of the sampling")

    plan = command("plan", "memory, time and cost of a run on a slice that is not here")
    experiment(plan, required=True)
    plan.add_argument(
        "--topology", metavar="SLICE", help="such as v5p:4x4x4, v6e-256 or h100:8"
    )
    plan.add_argument("--topologies", metavar="A,B", help="several, to be compared")
    plan.add_argument("--num_slices", type=int, default=1, help="of them, over DCN")
    plan.add_argument(
        "--search", action="store_true", help="propose mesh, accumulation and remat"
    )
    plan.add_argument(
        "--full", action="store_true", help="compile to machine code (minutes)"
    )
    plan.add_argument(
        "--tokens", type=float, default=0.0, help="of the bill (default: num_steps')"
    )
    plan.add_argument("--region", help="of the grid's carbon")
    for name, words in (
        ("price_per_chip_hour", "US dollars"),
        ("watts_per_chip", "with the chip's share of its host"),
        ("pue", "energy of the site / energy of the machines"),
        ("grid_g_per_kwh", "grams of CO2 equivalent"),
    ):
        plan.add_argument(f"--{name}", type=float, help=f"{words} (default: a table)")

    bench = command("bench", "speed of the step here, and what the hardware could do")
    experiment(bench, required=True)
    bench.add_argument("--steps", type=int, default=20, help="that are timed")
    bench.add_argument(
        "--data", action="store_true", help="read the settings' data (default: random)"
    )
    bench.add_argument(
        "--profile", action="store_true", help="say where the time went, with a trace"
    )
    bench.add_argument(
        "--sweep", action="store_true", help="try attention, layers, remat and batches"
    )
    bench.add_argument(
        "--workdir", metavar="DIR", default="", help="of the trace (default: temporary)"
    )
    processes(bench)

    bring = command("import", "a Hugging Face checkpoint folder becomes a run")
    bring.add_argument(
        "--from", dest="source", metavar="DIR", required=True,
        help="folder with config.json and safetensors",
    )  # fmt: skip
    workdir(bring)

    take = command("export", "a run becomes a Hugging Face checkpoint folder")
    experiment(take, required=False)
    workdir(take)
    step(take)
    take.add_argument("--to", metavar="DIR", required=True, help="folder to be made")
    take.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="",
        help="of the tensors (default: as they are stored)",
    )  # fmt: skip
    take.add_argument(
        "--merge", action="store_true",
        help="add adapters to the weights (default: export them alone)",
    )  # fmt: skip

    settings = command("config", "the resolved settings and the sharding table")
    experiment(settings, required=True)
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """Returns the ids of "1,2,3"."""
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as err:
        raise argparse.ArgumentTypeError(
            f"invalid ids {text!r}; give whole numbers with commas between"
        ) from err


def read(argv: list[str]) -> tuple[argparse.Namespace, config.RunConfig]:
    """Returns a command's arguments and the checked settings it works with.

    Raises:
      ConfigError: with every problem of the options, the experiment and the overrides.
    """
    if argv[:1] == ["supervise"]:
        return _supervised(argv)
    overrides, plain, problems = [], [], []
    for arg in argv:
        if arg.startswith("--config."):
            path, equals, text = arg.removeprefix("--config.").partition("=")
            if equals:
                overrides.append((path, text))
            else:
                problems.append(f"{arg}; no value; write {arg}=VALUE.")
        else:
            plain.append(arg)
    args, unknown = _parser().parse_known_args(plain)
    known = ["--" + name for name in vars(args) if name != "command"]
    known += ["--config." + path for path, _, _ in config.leaves(config.RunConfig())]
    for arg in unknown:
        near = difflib.get_close_matches(arg.partition("=")[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"see {args.command} --help."
        problems.append(f"{arg}; not an option of {args.command}; {hint}")
    args.overrides = overrides
    if args.command == "bench":
        problems += _bench_problems(args)
    try:
        run = _load(args, overrides)
    except ConfigError as err:
        raise ConfigError([*problems, *err.problems]) from err
    if problems:
        raise ConfigError(problems)
    return args, run


def _supervised(argv: list[str]) -> tuple[argparse.Namespace, config.RunConfig]:
    """Returns the arguments of `supervise`, with the words of what it starts."""
    end = argv.index("--") if "--" in argv else len(argv)
    own, words = argv[:end], argv[end + 1 :]
    args = _parser().parse_args(own)
    if args.retries < 0:
        raise ConfigError([f"--retries={args.retries}; below 0; give 0 or more."])
    if words[:1] != ["train"]:
        raise ConfigError(
            [f"supervise; {' '.join(words[:1]) or 'nothing'} after --; write -- train."]
        )
    inner, run = read(words)
    args.words, args.workdir = words, inner.workdir
    return args, run


def _load(
    args: argparse.Namespace, overrides: list[tuple[str, str]]
) -> config.RunConfig:
    if args.command == "import":  # its config.json gives the settings
        return config.RunConfig()
    if vars(args).get("save_logits") and not args.tokens:
        raise ConfigError(
            [
                f"--save_logits={args.save_logits}; no effect without --tokens; "
                "give ids in --tokens."
            ]
        )
    if args.config:
        return config.load(args.config, overrides)
    run = config.load(_settings_of(args.workdir), overrides)
    if any(path.startswith("mesh.") for path, _ in overrides):
        return run
    # Whatever mesh it was trained on, spread it over the devices that are here.
    return dataclasses.replace(run, mesh=config.MeshConfig(fsdp=-1))


def _bench_problems(args: argparse.Namespace) -> Iterator[str]:
    if args.steps < 1:
        yield f"--steps={args.steps}; below 1; give 1 or more."
    if args.workdir and not args.profile:
        yield f"--workdir={args.workdir}; no effect without --profile; give both."


def _settings_of(workdir: str) -> str:
    """Returns the path of the settings a run left in its workdir."""
    path = Workdir.of(workdir).config
    if not path.is_file():
        raise ConfigError(
            [
                f"--workdir={workdir}; no config.json there; "
                "give the workdir of a run that `scaletrain train` started."
            ]
        )
    return str(path)
