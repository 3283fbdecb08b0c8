"""Experiment file and command-line overrides to a frozen `RunConfig`, and back.

A person fills in an ml_collections ConfigDict; the program reads frozen dataclasses.
Neither is safe alone: a ConfigDict checks no values, and a dataclass's own checks do
not run again after an override. All problems are reported at once.
"""

import contextlib
import dataclasses
import json
import typing
from collections.abc import Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from scaletrain import paths
from scaletrain.config import rules
from scaletrain.config.experiment import experiment, from_object
from scaletrain.config.overrides import applied, field_at, parsed
from scaletrain.config.schema import RunConfig
from scaletrain.errors import ConfigError


def load(spec: str, overrides: Iterable[tuple[str, str]] = ()) -> RunConfig:
    """Returns the checked run of an experiment file and its overrides.

    Args:
      spec: FILE or FILE:ARG; ARG is handed to the file's `get_config`.
      overrides: (dotted path, text) as written after `--config.`; the last one wins.

    Raises:
      ConfigError: with every problem of the file, the overrides and their values.

    Example:
      >>> run = load("experiments/quickstart.py", [("num_steps", "50")])
      >>> run.num_steps, run.optim.name
      (50, 'adamw')
    """
    return _checked(experiment(spec), overrides)


def override(run: RunConfig, overrides: Iterable[tuple[str, str]]) -> RunConfig:
    """Returns `run` with overrides, checked; see `load` for arguments and errors."""
    return _checked(to_config_dict(run), overrides)


def from_json(text: str, where: str = "config.json") -> RunConfig:
    """Returns the run that `to_json` wrote.

    Args:
      text: JSON.
      where: origin of the text, for messages.

    Raises:
      ConfigError: it is not JSON, or has settings this version does not know or accept.
    """
    return _checked(from_object(text, where), ())


def to_json(run: RunConfig) -> str:
    """Returns the run's settings as an indented JSON object."""
    return json.dumps(dataclasses.asdict(run), indent=2) + "\n"


def to_config_dict(config: Any) -> ConfigDict:
    """Returns the locked ConfigDict of settings, which experiment files return."""
    return ConfigDict(dataclasses.asdict(config)).lock()


def from_config_dict(form: ConfigDict) -> tuple[RunConfig, list[str]]:
    """Returns the run that `form` describes, and the problems of reading it.

    A setting that could not be read keeps its default, so that the checks of the
    others still run.
    """
    values, problems = {}, []
    for path, value in _flat(form):
        try:
            values[path] = _typed(path, value)
        except ValueError as err:
            problems.append(str(err))
    return applied(RunConfig(), values), problems


def _checked(form: ConfigDict, given: Iterable[tuple[str, str]]) -> RunConfig:
    overrides, problems = parsed(given)
    # Through the form, so that references inside an experiment follow.
    with form.unlocked(), form.ignore_type():
        for path, value in overrides.items():
            _put(form, path, value)
    run, unreadable = from_config_dict(form)
    problems += unreadable + rules.problems(run)
    if problems:
        raise ConfigError(problems)
    return run


def _put(form: ConfigDict, path: str, value: Any) -> None:
    """Sets the value at a dotted path, also where the form lacks its group."""
    head, _, rest = path.partition(".")
    if not rest:
        form[head] = value
        return
    if not isinstance(form.get(head), ConfigDict):
        form[head] = ConfigDict()
    inner: Any = form[head]
    _put(inner, rest, value)


def _flat(form: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in form.items():
        if isinstance(value, ConfigDict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _typed(path: str, value: Any) -> Any:
    """Returns the value of a form as the setting's type; raises ValueError."""
    field = field_at(path, repr(value))
    kind: Any = field.type
    if typing.get_origin(kind) is tuple:
        if isinstance(value, (tuple, list)) and all(type(v) is str for v in value):
            return tuple(value)
        raise ValueError(f"{path}={value!r}; not a list of names; write a,b,c.")
    if kind is float and type(value) is int:
        with contextlib.suppress(OverflowError):
            value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"{path}={value!r}; {type(value).__name__} where {kind.__name__} is "
            f"wanted; give a value of type {kind.__name__}."
        )
    if field.metadata["path"] and isinstance(value, str):
        return paths.expanded(value)
    return value
