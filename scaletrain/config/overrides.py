"""Overrides: other values for some settings, by their dotted paths.

As text they are what a command line says after `--config.`; as values they are what
`plan` proposes and `bench --sweep` tries.
"""

import contextlib
import dataclasses
import difflib
import typing
from collections.abc import Iterable
from typing import Any

from scaletrain.config.schema import FIELDS, RunConfig
from scaletrain.config.setting import get

Overrides = dict[str, Any]
_NUMBERS = {int: "a whole number", float: "a number"}


def applied(config: Any, overrides: Overrides) -> Any:
    """Returns settings (a run's or a group of them) with `overrides`, not checked.

    Example:
      >>> from scaletrain.config import RunConfig
      >>> applied(RunConfig(), {"optim.b1": 0.8}).optim.b1
      0.8
    """
    for path, value in overrides.items():
        head, _, rest = path.partition(".")
        new = applied(getattr(config, head), {rest: value}) if rest else value
        config = dataclasses.replace(config, **{head: new})
    return config


def changes(run: RunConfig, overrides: Overrides) -> dict[str, Any]:
    """Returns those of `overrides` that change a setting of `run`."""
    return {path: value for path, value in overrides.items() if get(run, path) != value}


def flags(overrides: Overrides) -> list[str]:
    """Returns `overrides` as words of a command line, which `parsed` reads.

    Example:
      >>> flags({"mesh.fsdp": 4})
      ['--config.mesh.fsdp=4']
    """

    def text(value: Any) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    return [f"--config.{path}={text(value)}" for path, value in overrides.items()]


def parsed(given: Iterable[tuple[str, str]]) -> tuple[dict[str, Any], list[str]]:
    """Returns the overrides of texts (the last one of a path counts), and all problems.

    Args:
      given: (dotted path, text) as written after `--config.`.
    """
    overrides, problems = {}, []
    for path, text in given:
        try:
            overrides[path] = _value(path, text)
        except ValueError as err:
            problems.append(str(err))
    return overrides, problems


def _value(path: str, text: str) -> Any:
    """Returns `text` as the setting at `path` takes it; raises ValueError."""
    kind = field_at(path, text).type
    if typing.get_origin(kind) is tuple:
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        return whole_number(text) if kind is int else kind(text)
    except ValueError as err:
        number = _NUMBERS[kind]
        raise ValueError(f"{path}={text}; not {number}; give {number}.") from err


def whole_number(text: str) -> int:
    """Returns the whole number that `text` is, also written as 1e3.

    Raises:
      ValueError: the text is no whole number.
    """
    with contextlib.suppress(ValueError):
        return int(text)
    number = float(text)
    if not number.is_integer():
        raise ValueError(f"{text!r} is not a whole number")
    return int(number)


def field_at(path: str, text: str) -> Any:
    """Returns the field of the setting at `path`.

    Args:
      text: the value given to it, for the message.

    Raises:
      ValueError: there is no such setting; with the nearest one.
    """
    if path not in FIELDS:
        raise ValueError(f"{path}={text}; no such setting; {nearest(path, FIELDS)}")
    return FIELDS[path]


def nearest(path: str, paths: Iterable[str]) -> str:
    """Returns "did you mean" advice for a path that is none of `paths`."""
    paths = list(paths)
    near = difflib.get_close_matches(path, paths, 1, 0.6)
    by_name = [each for each in paths if each.split(".")[-1] == path.split(".")[-1]]
    near = near or difflib.get_close_matches(path, by_name, 1, 0.0)
    if near:
        return f"did you mean {near[0]}?"
    return "`scaletrain config --explain` lists them all."
