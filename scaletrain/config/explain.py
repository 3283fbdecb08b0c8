"""The metadata of settings: for a terminal, as data, and as a page of docs/."""

import dataclasses
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

from scaletrain.config.overrides import nearest
from scaletrain.config.schema import FIELDS, RunConfig
from scaletrain.config.setting import Condition, get, leaves
from scaletrain.errors import ConfigError

Story = dict[str, Any]
_KINDS = {int: "whole number", float: "number", str: "text"}


def stories(path: str = "") -> list[Story]:
    """Returns the metadata of every setting, of a group, or of one.

    Args:
      path: a setting, such as optim.b1, or a group, such as optim; "" = all.

    Raises:
      ConfigError: there is no such setting.
    """
    chosen = [
        _story(each) for each in FIELDS if not path or f"{each}.".startswith(f"{path}.")
    ]
    if not chosen:
        known = [*FIELDS, *_groups()]
        raise ConfigError(
            [f"--explain={path}; no such setting; {nearest(path, known)}"]
        )
    return chosen


def _story(path: str) -> Story:
    field = FIELDS[path]
    story, resume = field.metadata, field.metadata["resume"]
    kind = "names" if typing.get_origin(field.type) is tuple else _KINDS[field.type]
    return {
        "setting": path,
        "type": "path" if story["path"] else kind,
        "default": get(RunConfig(), path),
        "doc": story["doc"],
        "choices": story["choices"],
        "least": story["least"],
        "most": story["most"],
        "used_when": [str(condition) for condition in story["used_when"]],
        "resume": f"free when {resume}" if isinstance(resume, Condition) else resume,
    }


def in_words(chosen: list[Story]) -> str:
    """Returns the text that a terminal shows for `chosen` settings."""
    return "\n\n".join("\n".join(_lines(story)) for story in chosen)


def _lines(story: Story) -> Iterator[str]:
    yield f"{story['setting']} = {_spelled(story['default'])}"
    yield textwrap.fill(
        story["doc"], 88, initial_indent="    ", subsequent_indent="    "
    )
    facts = {
        "values": _values(story),
        "used": _used(story),
        "resume": _resume(story),
    }
    for name, words in facts.items():
        if words:
            indent = "    " + " " * len(f"{name}: ")
            yield textwrap.fill(f"    {name}: {words}", 88, subsequent_indent=indent)


def _spelled(value: Any) -> str:
    """Returns a value as a command line spells it."""
    text = ",".join(value) if isinstance(value, tuple) else str(value)
    return text or "''"


def _values(story: Story) -> str:
    if story["choices"]:
        return ", ".join(map(_spelled, story["choices"]))
    least, most = story["least"], story["most"]
    if least is None:
        return story["type"]
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    return f"{story['type']}, {limits}"


def _used(story: Story) -> str:
    conditions = story["used_when"]
    return f"when {', and '.join(conditions)}" if conditions else ""


def _resume(story: Story) -> str:
    if story["resume"] == "fixed":
        return "may not change"
    return story["resume"].replace("free", "may change")


def _groups(config: Any = None, prefix: str = "") -> dict[str, Any]:
    """Returns the groups of settings by their dotted paths."""
    config = config or RunConfig()
    groups = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            path = f"{prefix}{field.name}"
            groups |= {path: value} | _groups(value, f"{path}.")
    return groups


def page() -> str:
    """Returns docs/reference/settings.md."""
    lines = [
        "# Settings",
        "",
        "Made by `make reference` from `scaletrain/config/schema/`; also printed by",
        "`scaletrain config --explain`. `--config.PATH=VALUE` overrides a setting.",
        "Where a setting is not used, any value but its default is refused. The last",
        "column says whether it may change when a run is resumed.",
    ]
    for path, group in {"": RunConfig(), **_groups()}.items():
        lines += ["", f"## {path or 'The run'}", "", str(type(group).__doc__), ""]
        lines += ["| setting | default | meaning | values | used | on resume |"]
        lines += ["|---|---|---|---|---|---|"]
        own = {field.name for field in dataclasses.fields(group)}
        for setting, _, _ in leaves(group):
            if setting in own:
                lines.append(_row(_story(f"{path}.{setting}".lstrip("."))))
    return "\n".join(lines) + "\n"


def _row(story: Story) -> str:
    cells = (
        f"`{story['setting']}`",
        f"`{_spelled(story['default'])}`",
        story["doc"],
        _values(story),
        _used(story) or "always",
        _resume(story),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
