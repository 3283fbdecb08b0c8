"""The exceptions for problems that a user can act on.

ScaletrainError
├── ConfigError      settings or a command line that cannot be honoured
├── ShardingError    a mesh or a parameter layout that cannot be honoured
├── ClusterError     processes that contradict each other
│   └── LostError    a process that does not join, or that is gone
├── DataError        a corpus or a tokenizer that cannot be read as asked
├── CheckpointError  a checkpoint that is missing, partial or of another model
├── PlanError        a compiler that refuses a program
├── BenchError       a step that the devices cannot hold
├── MachineError     memory, a disk or a device that is not available
├── DivergedError    updates that are all skipped, after every rollback
└── Interrupted      a signal, after which the state was saved

`exit_code` is the exit code of the process. Programmer errors are `assert`s.
"""

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """Returns `number` with its noun: 1 device, 2 devices.

    Args:
      number: how many there are.
      noun: the singular.
      plural: the plural; "" = the noun with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


class ScaletrainError(Exception):
    """A problem the user can act on; its text needs no traceback."""

    exit_code = 2


class ConfigError(ScaletrainError, ValueError):
    """Settings that cannot be honoured; it has the problems of all of them."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"this cannot be honoured:\n{lines}")


class ShardingError(ScaletrainError):
    """A layout that does not fit the mesh."""


class ClusterError(ScaletrainError):
    """Processes that cannot work together as they were started."""


class LostError(ClusterError):
    """A process that did not join, or that is gone."""

    exit_code = 75


class DataError(ScaletrainError):
    """Data that cannot be read as asked."""


class CheckpointError(ScaletrainError):
    """A checkpoint that cannot be used as asked."""


class PlanError(ScaletrainError):
    """A program that the compiler refuses."""

    exit_code = 1


class BenchError(ScaletrainError):
    """A step that the devices cannot hold."""

    exit_code = 1


class MachineError(ScaletrainError):
    """Memory, a disk or a device that is missing while a command runs."""

    exit_code = 1


class DivergedError(ScaletrainError):
    """Training whose updates are all skipped, after every rollback that is allowed."""

    exit_code = 1


class Interrupted(ScaletrainError):
    """A signal that stopped the run, after its state was saved."""

    exit_code = 75


def does_not_fit(message: str) -> bool:
    """Whether a compiler or allocator says that a device's memory is too small.

    The compiler has the same words for a TPU's fast memory, `vmem`, which does not
    count: there a kernel's blocks are too large, and a smaller step does not help.
    """
    exhausted = "RESOURCE_EXHAUSTED" in message or "Out of memory" in message
    return exhausted and "memory space vmem" not in message
