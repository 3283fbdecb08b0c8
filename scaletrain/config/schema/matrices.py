"""The matrices of a layer, by the names that settings and models/ use."""

import fnmatch

LINEARS = (
    "attention/q", "attention/k", "attention/v", "attention/o",
    "mlp/gate", "mlp/up", "mlp/down",
)  # fmt: skip


def named(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names in LINEARS that one of `patterns` is for."""
    return tuple(
        name for name in LINEARS if any(fnmatch.fnmatch(name, p) for p in patterns)
    )
