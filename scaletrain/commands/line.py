"""The command line: arguments to a command, its options and checked settings."""

import argparse
import difflib
from typing import Any, NoReturn

import scaletrain
from scaletrain import config, paths
from scaletrain.commands import COMMANDS
from scaletrain.config import RunConfig
from scaletrain.errors import ConfigError

_EPILOG = """\
settings: --config.a.b=value overrides any setting, as in --config.num_steps=50;
          `scaletrain config --explain` says what each is for
exit codes: 0 done, 1 the run failed, 2 the request cannot be honoured,
            75 interrupted, saved, start me again,
            130 or 143 ended at once by a signal
"""


class _Parser(argparse.ArgumentParser):
    """A parser that raises ConfigError for a mistake, as settings do."""

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
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        words = {"help": command.help, "description": command.help}
        sub = subparsers.add_parser(name, **words, **shape)
        command.add_arguments(sub)
        if command.settings is not None:  # otherwise its results are another command's
            sub.add_argument("--json", action="store_true", help="results as JSON")
    return parser


def read(argv: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Returns a command's options and its checked settings.

    Raises:
      ConfigError: with every problem of the options, the experiment and the overrides.
    """
    words: list[str] = []
    if argv[:1] == ["supervise"] and "--" in argv:
        end = argv.index("--")
        argv, words = argv[:end], argv[end + 1 :]
    overrides, plain, problems = _overrides(argv)
    args, unknown = _parser().parse_known_args(plain)
    problems += _unknown(args, unknown) + _places(args)
    args.overrides, args.words = overrides, words
    command = COMMANDS[args.command]
    problems += command.problems(args)
    if command.settings is None:
        if problems:
            raise ConfigError(problems)
        inner, run = read(words)
        args.workdir = inner.workdir
        return args, run
    try:
        run = command.settings(args)
    except ConfigError as err:
        raise ConfigError([*problems, *err.problems]) from err
    if problems:
        raise ConfigError(problems)
    return args, run


def _overrides(argv: list[str]) -> tuple[list[tuple[str, str]], list[str], list[str]]:
    """Returns (path, text) of each override, the other words, and problems."""
    overrides, plain, problems = [], [], []
    for word in argv:
        if not word.startswith("--config."):
            plain.append(word)
            continue
        path, equals, text = word.removeprefix("--config.").partition("=")
        if equals:
            overrides.append((path, text))
        else:
            problems.append(f"{word}; no value; write {word}=VALUE.")
    return overrides, plain, problems


def _unknown(args: argparse.Namespace, words: list[str]) -> list[str]:
    """Returns a problem for each word that is no option, with the nearest that is."""
    known = ["--" + name for name in vars(args) if name != "command"]
    known += ["--config." + path for path, _, _ in config.leaves(RunConfig())]
    problems = []
    for word in words:
        near = difflib.get_close_matches(word.partition("=")[0], known, 1)
        hint = f"did you mean {near[0]}?" if near else f"see {args.command} --help."
        problems.append(f"{word}; not an option of {args.command}; {hint}")
    return problems


def _places(args: argparse.Namespace) -> list[str]:
    """Expands the paths among the options; returns why some cannot be used."""
    options = {"source": "from"}
    problems = []
    for name in ("config", "workdir", "source", "to", "tokens", "save_logits"):
        if given := vars(args).get(name):
            path = paths.expanded(given)
            setattr(args, name, path)
            option = f"--{options.get(name, name)}"
            problems += paths.problems(option, path, local=True)
    return problems
