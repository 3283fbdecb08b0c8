"""The membership of this process in a run: its number and where process 0 listens."""

import dataclasses

from scaletrain.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Membership:
    """The number of this process, how many there are, and where process 0 listens.

    Args:
      source: flags or launcher that gave the numbers, as messages name it.
      num_processes: of the run, on all hosts.
      process_id: of this process, from 0.
      coordinator: HOST:PORT at which process 0 awaits the others; "" if unknown.
      gpus: indices of this process's GPUs among the visible ones; None = all of them.
    """

    source: str
    num_processes: int
    process_id: int
    coordinator: str
    gpus: tuple[int, ...] | None = None

    def __str__(self) -> str:
        return (
            f"processes: {self.num_processes} by {self.source}, this is "
            f"{self.process_id}, coordinator {self.coordinator}"
        )

    def check(self) -> None:
        """Raises ConfigError with everything that is wrong about the numbers."""
        n, i = self.num_processes, self.process_id
        problems = []
        if n < 1:
            problems.append(f"num_processes={n}; below 1; give 1 or more.")
        elif not 0 <= i < n:
            problems.append(
                f"process_id={i}; not one of {n} processes; number them 0 to {n - 1}."
            )
        host, colon, port = self.coordinator.rpartition(":")
        valid = host and colon and port.isdigit() and 0 < int(port) < 2**16
        if n > 1 and not self.coordinator:
            problems.append(
                "coordinator; not said where process 0 runs; give "
                "--coordinator=HOST:PORT."
            )
        elif n > 1 and not valid:
            problems.append(f"coordinator={self.coordinator}; give HOST:PORT.")
        if problems:
            raise ConfigError([f"{self.source}: {problem}" for problem in problems])
