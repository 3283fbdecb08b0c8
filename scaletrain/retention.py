"""Which checkpoints of a run stay.

Those at multiples of `checkpoint.every_steps`, and that of the last step, are
permanent: the newest `keep` of them stay. Others, saved by the clock or at a signal,
are temporary and go as soon as a newer one is whole.
"""

from collections.abc import Sequence
from typing import Any

from orbax.checkpoint.checkpoint_managers import preservation_policy as policy

from scaletrain.config import RunConfig


class Retention(policy.PreservationPolicy):
    """Decides for Orbax, which removes a step only after a newer one is whole."""

    def __init__(self, run: RunConfig):
        self._run = run

    def should_preserve(
        self, checkpoints: Sequence[Any], *, context: Any
    ) -> Sequence[bool]:
        """Returns whether each checkpoint stays; they come in the order of steps."""
        del context
        steps = [each.step for each in checkpoints]
        stay = self.kept(steps)
        return [step in stay for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int]:
        """Returns those of `steps`, in order, that stay."""
        c = self._run.checkpoint
        lasting = [step for step in steps if self._is_permanent(step)]
        stay = {*steps[-1:], *lasting[-c.keep :]}
        if c.keep_every_steps:
            stay |= {step for step in steps if step % c.keep_every_steps == 0}
        # Step 0 is an import: other runs may adapt it.
        return stay | {0}

    def _is_permanent(self, step: int) -> bool:
        every = self._run.checkpoint.every_steps
        return not every or step % every == 0 or step >= self._run.num_steps
