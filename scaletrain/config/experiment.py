"""Experiment files: Python that fills in the settings, or a run's config.json."""

import difflib
import importlib.util
import json
import os
import pathlib
import sys

from ml_collections import ConfigDict

from scaletrain.errors import ConfigError


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


def experiment(spec: str) -> ConfigDict:
    """Returns the ConfigDict of FILE[:ARG]: from its `get_config`, or from JSON.

    Raises:
      ConfigError: it cannot be read.
    """
    path, arg = file_and_argument(spec)
    where = f"--config={spec}"
    if not os.path.isfile(path):
        near = difflib.get_close_matches(path, map(str, _siblings(path)), 1, 0.5)
        hint = f"did you mean {near[0]}?" if near else "give the path of a .py file."
        raise ConfigError([f"{where}; no such file; {hint}"])
    if path.endswith(".json"):
        return from_object(pathlib.Path(path).read_text("utf-8", "replace"), where)
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
    if not isinstance(form, ConfigDict):
        raise ConfigError(
            [
                f"{where}; get_config() returned {type(form).__name__}; "
                "return scaletrain.config.to_config_dict(RunConfig(...))."
            ]
        )
    return form


def from_object(text: str, where: str) -> ConfigDict:
    """Returns the ConfigDict of a JSON object.

    Args:
      text: JSON.
      where: origin of the text, for messages.

    Raises:
      ConfigError: the text is no JSON object.
    """
    try:
        settings = json.loads(text)
        if not isinstance(settings, dict):
            raise ValueError("it is not an object")
        return ConfigDict(settings)
    except (ValueError, AttributeError, RecursionError) as err:
        raise ConfigError(
            [f"{where}; {err}; give settings as a run writes them in config.json."]
        ) from err


def _siblings(path: str) -> list[pathlib.Path]:
    folder = pathlib.Path(path).parent
    return sorted(folder.glob("*.py")) if folder.is_dir() else []
