"""Which checkpoints of a run stay.

Those at multiples of `checkpoint.every_steps`, and that of the last step, are
permanent: the newest `keep` of them stay. Others, saved by the clock or at a signal,
are temporary and go as soon as a newer one is whole.
"""

from collections.abc import Iterable

from scaletrain.config import RunConfig


def kept(run: RunConfig, steps: Iterable[int]) -> list[int]:
    """Returns those of `steps` that stay once all of them are whole, in order."""
    c, steps = run.checkpoint, sorted(steps)
    lasting = [step for step in steps if _is_permanent(run, step)]
    # Step 0 is an import: other runs may adapt it.
    stay = {0, *steps[-1:], *lasting[-c.keep :]}
    if c.keep_every_steps:
        stay |= {step for step in steps if step % c.keep_every_steps == 0}
    return [step for step in steps if step in stay]


def _is_permanent(run: RunConfig, step: int) -> bool:
    every = run.checkpoint.every_steps
    return not every or step % every == 0 or step >= run.num_steps
