"""A setting: a dataclass field with metadata.

Its rules, its messages, `scaletrain config --explain`, the reference page and whether
it may change when a run is resumed are all read from the field.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple


class Condition(NamedTuple):
    """Whether another setting has one of some values, or none of them."""

    switch: str  # dotted path of the other setting
    values: tuple[Any, ...]
    negated: bool

    def holds(self, run: Any) -> bool:
        """Returns whether the settings of a `RunConfig` fulfil the condition."""
        return (get(run, self.switch) in self.values) != self.negated

    def __str__(self) -> str:
        values = _listed(self.values)
        if self.negated:
            return f"{self.switch} is not {values}"
        return f"{self.switch} is {values}"


def when(switch: str, *values: Any) -> Condition:
    """Returns the condition that the setting `switch` has one of `values`."""
    return Condition(switch, values, negated=False)


def unless(switch: str, *values: Any) -> Condition:
    """Returns the condition that the setting `switch` has none of `values`."""
    return Condition(switch, values, negated=True)


def _listed(values: tuple[Any, ...]) -> str:
    *others, last = map(str, values)
    return f"{', '.join(others)} or {last}" if others else last


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    path: str = "",
    used_when: Condition | tuple[Condition, ...] = (),
    resume: str | Condition = "fixed",
    exported: bool = True,
) -> Any:
    """Returns a dataclass field with the metadata of a setting.

    Args:
      default: it decides the type too.
      doc: a sentence with the unit and the off value.
      choices: the values that a string may have; () = any.
      least: smallest number allowed.
      most: largest number allowed.
      path: "local" where a string is a path of this machine, "any" where it may be a
        URL too.
      used_when: conditions that must all hold for the setting to be read; a value
        other than the default is refused otherwise.
      resume: "free" if it may change when a run is resumed, "fixed" if not, or the
        condition under which it may.
      exported: whether it is part of the config of an exported model; False for a
        setting of the model that changes only training or execution.
    """
    if isinstance(used_when, Condition):
        used_when = (used_when,)
    metadata = {
        "doc": doc,
        "choices": choices,
        "least": least,
        "most": most,
        "path": path,
        "used_when": used_when,
        "resume": resume,
        "exported": exported,
    }
    return dataclasses.field(default=default, metadata=metadata)


# A setting that may change when a run is resumed.
free = functools.partial(setting, resume="free")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted path, dataclass field, value) of every setting, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


def get(config: Any, path: str) -> Any:
    """Returns the value of the setting at a dotted path."""
    for name in path.split("."):
        config = getattr(config, name)
    return config
