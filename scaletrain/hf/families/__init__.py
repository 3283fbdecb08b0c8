"""Published model families: one file each, all of them settings of one decoder.

    mapping    the parameters of each tensor: declared once, read in both directions
    normalise  the older and newer spellings of config.json become one

To add one, declare a `Family` in a file of its name and list it in `config.FAMILIES`.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from scaletrain import config as settings
from scaletrain.config import ModelConfig
from scaletrain.errors import CheckpointError
from scaletrain.hf.families import mapping, normalise
from scaletrain.hf.families.mapping import Entry, Family, Piece, entries

__all__ = ["FAMILIES", "Entry", "Family", "Piece", "entries", "of_config", "of_model"]

FAMILIES: dict[str, Family] = {
    name: importlib.import_module(f"{__name__}.{name}").FAMILY
    for name in settings.FAMILIES
    if name
}


def of_config(config: Mapping[str, Any]) -> tuple[Family, ModelConfig]:
    """Returns the family and the settings that a config.json describes.

    Raises:
      CheckpointError: a family or a key that is not supported.
    """
    kind = config.get("model_type")
    for family in FAMILIES.values():
        if kind in family.model_types:
            try:
                flat = normalise.flat(dict(config))
            except ValueError as err:
                raise CheckpointError(
                    f"config.json cannot be honoured:\n  {err}"
                ) from err
            return family, mapping.to_model(family, flat)
    known = ", ".join(t for family in FAMILIES.values() for t in family.model_types)
    raise CheckpointError(
        f"config.json: model_type={kind!r}; no family of that name is known here; "
        f"the known ones are {known}."
    )


def of_model(name: str, model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """Returns the family that can describe `model`, and the content of its config.json.

    Args:
      name: the family; "" = the first that can describe it.

    Raises:
      CheckpointError: none can; with the settings that are in the way.
    """
    reasons = []
    for family in [FAMILIES[name]] if name else FAMILIES.values():
        try:
            return family, mapping.to_config(family, model)
        except ValueError as err:
            reasons.append(f"{family.name}: {err}")
    lines = "\n".join(f"  {reason}" for reason in reasons)
    raise CheckpointError(
        "no published family has such a model; these settings are in the way:\n" + lines
    )
