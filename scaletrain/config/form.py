"""The way in: experiment file and command-line overrides to a frozen `RunConfig`.

A person fills in an ml_collections ConfigDict; the program reads frozen dataclasses.
Neither is safe alone: a ConfigDict checks no values, and a dataclass's own checks do
not run again after an override. Every function here returns what it could read and
the list of problems it met, so that a user hears of all of them at once.
"""

import contextlib
import dataclasses
import difflib
import importlib.util
import json
import os
import pathlib
import sys
import typing
from collections.abc import Iterable
from typing import Any

from ml_collections import config_dict

from scaletrain import paths
from scaletrain.config import rules
from scaletrain.config.schema import RunConfig, leaves
from scaletrain.errors import ConfigError


def to_config_dict(config: Any) -> config_dict.ConfigDict:
    """Returns the locked form of `config` that experiment files hand out."""
    form = config_dict.ConfigDict()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        nested = dataclasses.is_dataclass(value)
        form[field.name] = to_config_dict(value) if nested else value
    return form.lock()


def _nearest(path: str, known: Iterable[str]) -> str:
    """Returns "did you mean" advice for a setting that does not exist."""
    known = list(known)
    near = difflib.get_close_matches(path, known, 1, 0.6)
    by_name = [k for k in known if k.split(".")[-1] == path.split(".")[-1]]
    near = near or difflib.get_close_matches(path, by_name, 1, 0.0)
    return f"did you mean {near[0]}?" if near else "`scaletrain config` lists them all."


def _typed(path: str, kind: type, value: Any) -> tuple[Any, str]:
    """Returns (value as `kind`, "") or (None, the problem)."""
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (tuple, list)) and all(type(v) is str for v in value):
            return tuple(value), ""
        return None, f"{path}={value!r}; not a list of names; write a,b,c."
    if type(value) is kind:
        return value, ""
    return None, (
        f"{path}={value!r}; {type(value).__name__} where {kind.__name__} is wanted; "
        f"give a value of type {kind.__name__}."
    )


def _parsed(path: str, kind: type, text: str) -> tuple[Any, str]:
    """Returns (`text` of the command line read as `kind`, "") or (None, problem)."""
    if typing.get_origin(kind) is tuple:
        return tuple(name.strip() for name in text.split(",") if name.strip()), ""
    if kind is str:
        return text, ""
    try:
        return (whole(text) if kind is int else kind(text)), ""
    except ValueError:
        names = {int: "a whole number", float: "a number"}
        return None, f"{path}={text}; not {names[kind]}; give {names[kind]}."


def whole(text: str) -> int:
    """Returns the whole number that `text` is, also written as 1e3.

    Raises:
      ValueError: it is none.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def from_config_dict(form: config_dict.ConfigDict) -> tuple[RunConfig, list[str]]:
    """Returns the run that `form` describes, and what in it could not be read.

    A setting that could not be read keeps its default, so that the checks of the
    others still run.
    """
    flat = {}

    def flatten(node: Any, prefix: str) -> None:
        for name in node:
            value = node[name]
            if isinstance(value, config_dict.ConfigDict):
                flatten(value, f"{prefix}{name}.")
            else:
                flat[f"{prefix}{name}"] = value

    flatten(form, "")
    known = {path: field for path, field, _ in leaves(RunConfig())}
    run, problems = RunConfig(), []
    for path, value in flat.items():
        if path not in known:
            problems.append(
                f"{path}={value!r}; no such setting; " + _nearest(path, known)
            )
            continue
        typed, problem = _typed(path, known[path].type, value)
        if problem:
            problems.append(problem)
            continue
        if known[path].metadata.get("path"):
            typed = paths.expanded(typed)
        run = replaced(run, path, typed)
    return run, problems


def replaced(config: Any, path: str, value: Any) -> Any:
    """Returns `config` with the setting at the dotted `path` exchanged."""
    head, _, rest = path.partition(".")
    new = replaced(getattr(config, head), rest, value) if rest else value
    return dataclasses.replace(config, **{head: new})


def file_and_argument(spec: str) -> tuple[str, str]:
    """Returns FILE and ARG of FILE[:ARG], where both may have colons of their own.

    FILE is the longest part before a colon that is a file.
    """
    parts = spec.split(":")
    for size in range(len(parts), 0, -1):
        path = ":".join(parts[:size])
        if os.path.isfile(path):
            return path, ":".join(parts[size:])
    return parts[0], ":".join(parts[1:])


def _experiment(spec: str) -> config_dict.ConfigDict:
    """Returns what `get_config` of FILE[:ARG] returns, or a run's config.json."""
    path, arg = file_and_argument(spec)
    where = f"--config={spec}"
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, map(str, _siblings(path)), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "give the path of a .py file."
        raise ConfigError([f"{where}; no such file; {hint}"])
    if path.endswith(".json"):
        return _object(pathlib.Path(path).read_text("utf-8", "replace"), where)
    module_spec = importlib.util.spec_from_file_location("scaletrain_experiment", path)
    if module_spec is None or module_spec.loader is None:
        raise ConfigError([f"{where}; not a Python file; give the path of a .py file."])
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses look annotations up in the module that they are registered under.
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
        form = module.get_config(arg) if arg else module.get_config()
    except Exception as err:  # the file is the user's: anything can come out of it
        line = f"{type(err).__name__}: {err}".strip().splitlines()[0]
        raise ConfigError([f"{where}; reading it raised {line}; correct it."]) from err
    finally:
        del sys.modules[module_spec.name]
    if not isinstance(form, config_dict.ConfigDict):
        raise ConfigError(
            [
                f"{where}; get_config() returned {type(form).__name__}; "
                "return scaletrain.config.to_config_dict(RunConfig(...))."
            ]
        )
    return form


def _object(text: str, where: str) -> config_dict.ConfigDict:
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError("it is not an object")
        return config_dict.ConfigDict(found)
    except (ValueError, AttributeError, RecursionError) as err:
        raise ConfigError(
            [f"{where}; {err}; give settings as a run writes them in config.json."]
        ) from err


def _siblings(path: str) -> list[pathlib.Path]:
    folder = pathlib.Path(path).parent
    return sorted(folder.glob("*.py")) if folder.is_dir() else []


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> RunConfig:
    """Returns the checked run of an experiment file and its overrides.

    Args:
      spec: FILE or FILE:ARG; ARG is handed to the file's `get_config`.
      overrides: (dotted path, text) as written after `--config.`; the last one wins.

    Raises:
      ConfigError: with every problem of the file, the overrides and their values.
    """
    return _filled(_experiment(spec), overrides)


def override(run: RunConfig, overrides: Iterable[tuple[str, str]]) -> RunConfig:
    """Returns `run` with overrides as `load` takes them; raises what it raises."""
    return _filled(to_config_dict(run), overrides)


def _filled(
    form: config_dict.ConfigDict, overrides: Iterable[tuple[str, str]]
) -> RunConfig:
    known = {path: field for path, field, _ in leaves(RunConfig())}
    problems = []
    for path, text in overrides:
        if path not in known:
            problems.append(f"{path}={text}; no such setting; " + _nearest(path, known))
            continue
        value, problem = _parsed(path, known[path].type, text)
        if problem:
            problems.append(problem)
            continue
        # Through the form, so that references inside an experiment follow.
        with form.unlocked():
            form.update_from_flattened_dict({path: value})
    run, unreadable = from_config_dict(form)
    problems += unreadable + rules.problems(run)
    if problems:
        raise ConfigError(problems)
    return run


def to_json(run: RunConfig) -> str:
    """Returns the run's settings as an indented JSON object."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def from_json(text: str, where: str = "config.json") -> RunConfig:
    """Returns the run that `to_json` wrote.

    Args:
      where: the text is from.

    Raises:
      ConfigError: it is not JSON, or has settings this version does not know or accept.
    """
    run, problems = from_config_dict(_object(text, where))
    problems += rules.problems(run)
    if problems:
        raise ConfigError(problems)
    return run
