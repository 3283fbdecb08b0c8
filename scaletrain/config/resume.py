"""The settings that differ between two attempts at one run."""

from scaletrain.config.schema import RunConfig
from scaletrain.config.setting import Condition, get, leaves


def differences(then: RunConfig, now: RunConfig) -> tuple[list[str], list[str]]:
    """Returns the changed settings that stop a resume, and those that do not."""
    fixed, free = [], []
    for path, field, before in leaves(then):
        after, resume = get(now, path), field.metadata["resume"]
        if before == after:
            continue
        may = resume.holds(then) if isinstance(resume, Condition) else resume == "free"
        line = f"{path}: {before!r} then, {after!r} now"
        (free if may else fixed).append(line)
    return fixed, free
