"""Records that JSON can represent."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """Returns `value` with None in place of numbers that are not finite.

    JSON has no NaN and no infinity, and strict readers refuse a file with one.
    """
    if isinstance(value, dict):
        return {name: finite(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
