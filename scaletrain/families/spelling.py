"""config.json as it is spelled: older and newer, nested and flat.

Readers of every age know the older spelling, so that is the one written.
"""

from typing import Any


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with one spelling for each thing it says.

    Rotary settings become `rope_theta`, `rope_local_base_freq` and `rope_scaling.*`;
    the kinds of the layers become `sliding_pattern`: every n-th attends to all tokens,
    1 = all do, 0 = none.

    Raises:
      ValueError: with what cannot be said in these keys.
    """
    found = dict(config.get("text_config") or config)
    found.setdefault("model_type", config.get("model_type"))
    rope = found.pop("rope_parameters", None)
    scaling = dict(found.pop("rope_scaling", None) or {})
    if rope and "full_attention" in rope:
        local = rope["sliding_attention"]
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters.sliding_attention={local!r}; not supported; "
                "layers with a window are not stretched."
            )
        found["rope_local_base_freq"] = local["rope_theta"]
        rope = rope["full_attention"]
    # Where both are given, readers go by the older one.
    scaling = scaling or dict(rope or {})
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            found[name] = scaling.pop(name)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    if scaling["rope_type"] == "default":
        scaling = {}
    found |= {f"rope_scaling.{name}": value for name, value in scaling.items()}
    pattern = _pattern(found)
    if pattern is not None:
        found["sliding_pattern"] = pattern
    return found


def _pattern(found: dict[str, Any]) -> int | None:
    kinds = found.pop("layer_types", None)
    said = [
        found.pop(name)
        for name in ("sliding_window_pattern", "_sliding_window_pattern")
        if found.get(name) is not None
    ]
    if not kinds:
        return said[0] if said else None
    for n in (*said, *range(len(kinds) + 1)):
        if kinds == layer_types(n, len(kinds)):
            return n
    raise ValueError(
        f"layer_types={kinds!r}; not supported; every n-th layer may attend to all."
    )


def layer_types(pattern: int, num_layers: int) -> list[str]:
    """Returns the kind of each layer under a `sliding_pattern`."""
    full = [bool(pattern) and (i + 1) % pattern == 0 for i in range(num_layers)]
    return ["full_attention" if each else "sliding_attention" for each in full]


def nested_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns flat keys with `rope_scaling` as the file nests it, or null."""
    words = {"linear": ("factor",), "llama3": None}
    scaling = {
        name.removeprefix("rope_scaling."): value
        for name, value in config.items()
        if name.startswith("rope_scaling.")
    }
    kept = words.get(scaling.get("rope_type", "default"), ())
    if kept is not None:
        scaling = {k: v for k, v in scaling.items() if k in ("rope_type", *kept)}
    rest = {k: v for k, v in config.items() if not k.startswith("rope_scaling.")}
    return rest | {"rope_scaling": scaling if kept != () else None}
