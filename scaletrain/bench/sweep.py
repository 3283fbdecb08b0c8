"""Settings tried one after another in this process: a few, in an order that pays.

Attention, the walk over layers and 8-bit matmuls, where the devices have units for
them, are chosen first, each on its own. Then batches grow from half to twice what was
asked for, each with the least recomputation that fits it: what does not fit a batch
does not fit a larger one, and at one batch computing less again is never slower.
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

_BATCHES = (0.5, 1, 1.5, 2)


class Sweep:
    """The candidates of a run on some devices, and what became of them."""

    def __init__(
        self, run: RunConfig, num_devices: int, measure: Callable[[RunConfig], Timed]
    ):
        self.run, self._num_devices, self._measure = run, num_devices, measure
        self._known: dict[RunConfig, float] = {}  # tokens a second, 0 = does not fit
        self._candidates: list[dict[str, Any]] = []
        self._left = 0

    def best(self) -> list[dict[str, Any]]:
        """Returns the candidates, fastest first and at the end those that do not fit.

        An interrupt ends the search with what is known.
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
        """Returns the run with `overrides`.

        Raises:
          ConfigError: the settings do not go together.
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
            [{"model.layers": way} for way in _choices("model.layers")],
            _matmuls(jax.devices()[0].device_kind),
        ]
        rest = len(batches) + len(CANDIDATES) - 1
        # Each switch begins with what is known of the one before.
        self._left = rest + sum(len(values) - 1 for values in switches) + 1
        chosen: Overrides = {}
        for values in switches:
            tried = [chosen | value for value in values]
            chosen = max(tried, key=self._speed)
        level, self._left = 0, rest
        for batch in batches:
            while not self._speed(chosen | batch | CANDIDATES[level]):
                level += 1
                if level == len(CANDIDATES):
                    return

    def _speed(self, overrides: Overrides) -> float:
        """Returns tokens a second of a device; 0 where the run is not possible."""
        try:
            run = self.applied(overrides)
            if run not in self._known:
                self._known[run] = 0.0
                self._known[run] = self._tried(run, overrides)
        except ConfigError:
            return 0.0
        return self._known[run]

    def _tried(self, run: RunConfig, overrides: Overrides) -> float:
        self._left -= 1
        timed, problem = None, ""
        try:
            timed = self._measure(run)
        except jax.errors.JaxRuntimeError as err:
            said = str(err).strip().splitlines()[0]
            problem = "does not fit" if does_not_fit(said) else f"fails: {said}"
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
        say(f"{words}: {verdict}; {self._left} more at most")
        return speed


def _matmuls(kind: str) -> list[Overrides]:
    """Returns the 8-bit matmuls to try on devices of a kind, after what is configured.

    Each with the scaling that costs least; what is only emulated is left out.
    """
    low = {
        "fp8": {"precision.matmul": "fp8", "precision.scaling": "delayed"},
        "int8": {"precision.matmul": "int8", "precision.scaling": "current"},
    }
    units = chips.low_precision(kind)
    return [{}, *(low[each] for each in units if units[each] > 1)]


def _choices(path: str) -> list[str]:
    """Returns the values a setting may have, but that which decides on one."""
    return [each for each in config.FIELDS[path].metadata["choices"] if each != "auto"]
