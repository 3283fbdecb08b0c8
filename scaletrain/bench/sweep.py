"""A short search for fast settings, which measures candidates in this process.

Attention, the loop over layers and 8-bit matmuls (where the devices have units for
them) are chosen first, one after the other. Then the batch grows from half to twice the
configured size, each time with the least recomputation that fits. That order saves
candidates: a policy that does not fit a batch does not fit a larger one, and for one
batch less recomputation is never slower.
"""

from collections.abc import Callable
from typing import Any

import jax

from scaletrain import config
from scaletrain.bench.measure import Timed
from scaletrain.compilation import CANDIDATES
from scaletrain.config import Overrides, RunConfig
from scaletrain.console import say
from scaletrain.errors import ConfigError, does_not_fit
from scaletrain.hardware import chips

_BATCHES = (0.5, 1, 1.5, 2)  # times the configured batch_size


class Sweep:
    """The candidates of a run, and the measurement of each.

    Args:
      run: the resolved settings from which the search starts.
      num_devices: of the mesh.
      measure: returns the times of a resolved run; raises JaxRuntimeError where the
        devices cannot run it.
    """

    def __init__(
        self, run: RunConfig, num_devices: int, measure: Callable[[RunConfig], Timed]
    ):
        self.run, self._num_devices, self._measure = run, num_devices, measure
        # Tokens a second of a device; 0 = does not fit.
        self._speeds: dict[RunConfig, float] = {}
        self._candidates: list[dict[str, Any]] = []
        self._remaining = 0  # candidates at most, for the messages

    def best(self) -> list[dict[str, Any]]:
        """Returns the candidates: the fastest first, those that do not fit last.

        After Ctrl-C, returns the candidates measured so far.
        """
        try:
            self._search()
        except KeyboardInterrupt:
            if not self._candidates:
                raise
            say("stopped; going on with the best of what is known")
        return sorted(
            self._candidates, key=lambda each: -each["tokens_per_s_per_device"]
        )

    def applied(self, overrides: Overrides) -> RunConfig:
        """Returns the run with `overrides`, resolved.

        Raises:
          ConfigError: the settings exclude each other.
        """
        return config.resolve(config.applied(self.run, overrides), self._num_devices)

    def _search(self) -> None:
        batches = [
            batch
            for factor in _BATCHES
            if config.is_possible(
                config.applied(
                    self.run,
                    batch := {"batch_size": int(self.run.batch_size * factor)},
                ),
                self._num_devices,
            )
        ]
        switches = [
            [{"model.attention": kind} for kind in _choices("model.attention")],
            [{"model.layers": loop} for loop in _choices("model.layers")],
            _matmuls(jax.devices()[0].device_kind),
        ]
        # Each try that does not fit raises `level`; all others go on to the next batch.
        rest = len(batches) + len(CANDIDATES) - 1
        # A switch has one candidate that was measured as the best of the last switch.
        self._remaining = rest + sum(len(values) - 1 for values in switches) + 1
        chosen: Overrides = {}
        for values in switches:
            tried = [chosen | value for value in values]
            chosen = max(tried, key=self._speed)
        level, self._remaining = 0, rest
        for batch in batches:
            while not self._speed(chosen | batch | CANDIDATES[level]):
                level += 1
                if level == len(CANDIDATES):
                    return

    def _speed(self, overrides: Overrides) -> float:
        """Returns tokens a second of a device; 0 where the run is not possible."""
        try:
            run = self.applied(overrides)
            if run not in self._speeds:
                # Stays 0 if measuring raises a ConfigError: it is not tried again.
                self._speeds[run] = 0.0
                self._speeds[run] = self._measured(run, overrides)
        except ConfigError:
            return 0.0
        return self._speeds[run]

    def _measured(self, run: RunConfig, overrides: Overrides) -> float:
        """Returns tokens a second of a device; adds the run to the candidates."""
        self._remaining -= 1
        timed, problem = None, ""
        try:
            timed = self._measure(run)
        except jax.errors.JaxRuntimeError as err:
            message = str(err).strip().splitlines()[0]
            problem = "does not fit" if does_not_fit(message) else f"fails: {message}"
        speed = 0.0
        if timed:
            speed = run.batch_size * run.seq_len / timed.step_time_s / self._num_devices
        changed = config.changes(self.run, overrides)
        self._candidates.append(
            {
                "overrides": changed,
                "fits": timed is not None,
                "problem": problem,
                "step_time_s": timed and timed.step_time_s,
                "tokens_per_s_per_device": speed,
                "peak_memory_bytes": timed and timed.peak_memory_bytes,
            }
        )
        words = " ".join(config.flags(changed)) or "as configured"
        verdict = problem or f"{speed:,.0f} tokens/s a device"
        say(f"{words}: {verdict}; {self._remaining} more at most")
        return speed


def _matmuls(kind: str) -> list[Overrides]:
    """Returns the 8-bit matmuls to try on devices of a kind, after the configured ones.

    Each has its cheapest scaling. Formats that the devices only emulate are skipped.
    """
    low = {
        "fp8": {"precision.matmul": "fp8", "precision.scaling": "delayed"},
        "int8": {"precision.matmul": "int8", "precision.scaling": "current"},
    }
    speedups = chips.low_precision(kind)
    return [{}, *(low[each] for each, speedup in speedups.items() if speedup > 1)]


def _choices(path: str) -> list[str]:
    """Returns the values of a setting, without "auto", which stands for one of them."""
    return [each for each in config.FIELDS[path].metadata["choices"] if each != "auto"]
