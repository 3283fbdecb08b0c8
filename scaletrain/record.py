"""Records as JSON holds them."""

import math
from typing import Any


def finite(value: Any) -> Any:
    """Returns `value` with None for each number in it that is not finite.

    JSON has no NaN and no infinity, and strict readers refuse a file with one.
    """
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
