"""Retention: the checkpoints of a run that stay on disk.

Checkpoints at multiples of `checkpoint.every_steps`, and the one of the last step, are
permanent: the newest `keep` of them stay. Others, saved by the clock or at a signal,
are temporary and are removed as soon as a newer one is complete.
"""

from collections.abc import Iterable

from scaletrain.config import RunConfig


def retained_steps(run: RunConfig, steps: Iterable[int]) -> list[int]:
    """Returns the steps that stay once all of `steps` are complete, in order."""
    c, steps = run.checkpoint, sorted(steps)
    permanent = [step for step in steps if _is_permanent(run, step)]
    # Step 0 is an import: other runs may adapt it.
    stay = {0, *steps[-1:], *permanent[-c.keep :]}
    if c.keep_every_steps:
        stay |= {step for step in steps if step % c.keep_every_steps == 0}
    return [step for step in steps if step in stay]


def _is_permanent(run: RunConfig, step: int) -> bool:
    every = run.checkpoint.every_steps
    return not every or step % every == 0 or step >= run.num_steps
