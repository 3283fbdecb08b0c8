"""Settings to an optax optimizer: gradients summed over tokens become updates.

The step hands over sums over tokens, not means: only after the last micro-batch is the
number of weighted tokens known, and dividing once by it makes any split of a batch give
the gradient of the undivided batch.

    optimizer     the chain: guard, clipping, direction, weight decay, learning rate
      guard       one division by tokens; non-finite and spiking updates are skipped
      muon        Muon's direction
    schedule      optimizer step to learning rate
    accumulation  a gradient function that sums over micro-batches
"""

from scaletrain.optim.accumulation import accumulated
from scaletrain.optim.guard import GuardState, guarded
from scaletrain.optim.optimizer import optimizer
from scaletrain.optim.schedule import schedule

__all__ = ["GuardState", "accumulated", "guarded", "optimizer", "schedule"]
