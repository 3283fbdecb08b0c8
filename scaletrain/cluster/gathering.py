"""The bookkeeping of gathers: which values have arrived, and who waits for them."""

import collections
import threading


class Gathering:
    """The gathers of one process, each known by a key that all processes count alike.

    Args:
      num_processes: whose values make a gather complete.
    """

    def __init__(self, num_processes: int):
        self._num_processes = num_processes
        self._changed = threading.Condition()
        self._counts = collections.Counter[str]()
        self._partial: dict[str, dict[int, str]] = {}  # in process 0: key -> values
        self._complete: dict[str, list[str]] = {}

    def begin(self, name: str) -> str:
        """Returns the key of the next gather of that name."""
        with self._changed:
            self._counts[name] += 1
            return f"{self._counts[name]} {name}"

    def add(self, key: str, process: int, value: str) -> list[str]:
        """Returns the values of all processes if this was the last one, else none.

        Only process 0 adds: the others send it their values.

        Args:
          key: of the gather.
          process: number of the one that the value comes from.
          value: for this gather.
        """
        with self._changed:
            values = self._partial.setdefault(key, {})
            values[process] = value
            if len(values) < self._num_processes:
                return []
            del self._partial[key]
            return [values[i] for i in range(self._num_processes)]

    def complete(self, key: str, values: list[str]) -> None:
        """Hands the values of all processes to the thread that waits for them."""
        with self._changed:
            self._complete[key] = values
            self._changed.notify_all()

    def wait(self, key: str) -> list[str]:
        """Returns the values of all processes, in order, once all have come."""
        with self._changed:
            self._changed.wait_for(lambda: key in self._complete)
            return self._complete.pop(key)
