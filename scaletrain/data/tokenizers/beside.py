"""The files beside a published tokenizer.json: names, settings, a chat template.

They are read in the way of `transformers`. All of them are optional.
"""

import json
from collections.abc import Mapping
from typing import Any

CONFIG = "tokenizer_config.json"
# The vocabulary's older files are left out: tokenizer.json holds what they hold.
NAMES = (
    CONFIG,
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "added_tokens.json",
    "tokenizer.model",
)
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")

Sidecars = Mapping[str, bytes]  # content by file name, of those of NAMES that exist


def read(filesystem: Any, path: str) -> dict[str, bytes]:
    """Returns the files in the folder of `path`.

    Raises:
      OSError: a file that exists cannot be read.
    """
    folder = path[: len(path) - len(path.rpartition("/")[2])]
    names = [name for name in NAMES if filesystem.isfile(folder + name)]
    return {name: filesystem.cat_file(folder + name) for name in names}


def config(files: Sidecars) -> dict[str, Any]:
    """Returns tokenizer_config.json, empty if there is none.

    Raises:
      ValueError: it is not a JSON object.
    """
    return _object(files, CONFIG)


def special_tokens(files: Sidecars) -> dict[str, str]:
    """Returns the spelling of `bos_token`, `eos_token` and the others that are named.

    Raises:
      ValueError: a file is not a JSON object.
    """
    named = config(files)
    if "added_tokens_decoder" not in named:  # the newer format needs no second file
        named = named | _object(files, "special_tokens_map.json")
    spellings = {}
    for key in (f"{name}_token" for name in _SPECIAL):
        value = named.get(key)
        spelling = value.get("content") if isinstance(value, dict) else value
        if isinstance(spelling, str):
            spellings[key] = spelling
    return spellings


def chat_template(files: Sidecars) -> str | None:
    """Returns the source of the template that conversations are written with.

    Raises:
      ValueError: a file has not the format of its name.
    """
    if "chat_template.jinja" in files:
        return files["chat_template.jinja"].decode("utf-8")
    name = "chat_template.json" if "chat_template.json" in files else CONFIG
    template = _object(files, name).get("chat_template")
    if isinstance(template, list):
        named = {each["name"]: each["template"] for each in template}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _object(files: Sidecars, name: str) -> dict[str, Any]:
    try:
        content = json.loads(files.get(name, b"{}").decode("utf-8"))
    except ValueError as err:
        raise ValueError(f"{name} beside it is not JSON: {err}") from err
    if not isinstance(content, dict):
        raise ValueError(f"{name} beside it is not a JSON object")
    return content
