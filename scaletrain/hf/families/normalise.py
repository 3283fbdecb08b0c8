"""The spellings of config.json: older and newer, nested and flat.

Old and new readers know the older spelling, so the older spelling is written.
"""

from collections.abc import Mapping
from typing import Any

from scaletrain.config import ModelConfig

# The keys of `rope_scaling` in a file, by its rope_type.
_UNSCALED = ()  # the file has null
_LINEAR = ("rope_type", "factor")
_LLAMA3 = (
    *_LINEAR,
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)
_SCALING_KEYS = {"default": _UNSCALED, "linear": _LINEAR, "llama3": _LLAMA3}


def shown(value: Any) -> str:
    """Returns a value of a file as text for a message, cut to about 200 characters."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config.json with one spelling for each setting.

    Rotary settings become `rope_theta`, `rope_local_base_freq` and `rope_scaling.*`;
    the kinds of the layers become `sliding_pattern`: every n-th attends to all tokens,
    1 = all do, 0 = none.

    Raises:
      ValueError: with the value that these keys cannot express.
    """
    flat_keys = dict(_group(config, "text_config") or config)
    flat_keys.setdefault("model_type", config.get("model_type"))
    rope, scaling = (_group(flat_keys, n) for n in ("rope_parameters", "rope_scaling"))
    for name in ("rope_parameters", "rope_scaling"):
        flat_keys.pop(name, None)
    if "full_attention" in rope:
        local = _group(rope, "sliding_attention")
        if local.get("rope_type", "default") != "default":
            raise ValueError(
                f"rope_parameters.sliding_attention={shown(local)}; not supported; "
                "layers with a window are not stretched."
            )
        if "rope_theta" not in local:
            raise ValueError(
                "rope_parameters.sliding_attention.rope_theta; missing; "
                "the model needs it."
            )
        flat_keys["rope_local_base_freq"] = local["rope_theta"]
        rope = _group(rope, "full_attention")
    # Where both are given, readers go by the older one.
    scaling = scaling or rope
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in scaling:
            flat_keys[name] = scaling.pop(name)
    kind = scaling.pop("type", None)
    scaling.setdefault("rope_type", kind or "default")
    if scaling["rope_type"] == "default":
        scaling = {}
    flat_keys |= {f"rope_scaling.{name}": value for name, value in scaling.items()}
    pattern = _pattern(flat_keys)
    if pattern is not None:
        flat_keys["sliding_pattern"] = pattern
    return flat_keys


def _group(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Returns a copy of an object in the file, empty if it is absent or null."""
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}={shown(value)}; not an object; fetch the file again.")
    return dict(value)


def _pattern(flat_keys: dict[str, Any]) -> int | None:
    """Returns the `sliding_pattern` of a file; None where no key gives one."""
    kinds = flat_keys.pop("layer_types", None)
    patterns = [
        flat_keys.pop(name)
        for name in ("sliding_window_pattern", "_sliding_window_pattern")
        if flat_keys.get(name) is not None
    ]
    for value in patterns:
        if type(value) is not int:
            raise ValueError(
                f"sliding_window_pattern={shown(value)}; not a whole number; "
                "fetch the file again."
            )
    if not kinds:
        return patterns[0] if patterns else None
    layers = flat_keys.get("num_hidden_layers")
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise ValueError(
            f"layer_types={shown(kinds)}; not a list for num_hidden_layers={layers!r}; "
            "fetch the file again."
        )
    for n in (*patterns, *range(len(kinds) + 1)):
        if kinds == layer_types(n, len(kinds)):
            return n
    raise ValueError(
        f"layer_types={shown(kinds)}; not supported; "
        "every n-th layer may attend to all."
    )


def layer_types(pattern: int, num_layers: int) -> list[str]:
    """Returns the kind of each layer under a `sliding_pattern`."""
    model = ModelConfig(sliding_window=1, global_every=pattern)
    return [
        "sliding_attention" if model.is_local(layer) else "full_attention"
        for layer in range(num_layers)
    ]


def nested_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Returns flat keys with `rope_scaling` as a nested object, or null."""
    scaling = {
        name.removeprefix("rope_scaling."): value
        for name, value in config.items()
        if name.startswith("rope_scaling.")
    }
    names = _SCALING_KEYS.get(scaling.get("rope_type", "default"), _UNSCALED)
    scaling = {k: v for k, v in scaling.items() if k in names}
    rest = {k: v for k, v in config.items() if not k.startswith("rope_scaling.")}
    return rest | {"rope_scaling": scaling or None}
