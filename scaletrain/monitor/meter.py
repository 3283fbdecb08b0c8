"""Meters: sources of numbers that a run reads once for each line of its log."""

from typing import Any, Protocol

import jax

from scaletrain.config import RunConfig
from scaletrain.flops import flops_per_token
from scaletrain.hardware.chips import by_kind


class Meter(Protocol):
    """A source of numbers for the records of `metrics.jsonl`."""

    def read(self, step_time_s: float) -> dict[str, float | int | None]:
        """Returns numbers by their names in the record; None = not known.

        Args:
          step_time_s: mean seconds of a step since the meter was read before.
        """
        ...

    def close(self) -> None:
        """Releases the meter's resources."""
        ...


class Throughput:
    """The speed of the steps, and the share of the chips' peak that it is (MFU)."""

    def __init__(self, run: RunConfig, devices: list[Any]):
        self._run, self._devices = run, devices

    def read(self, step_time_s: float) -> dict[str, Any]:
        """Returns the speed and both MFUs; None where the chip's peak is not known."""
        run, devices = self._run, self._devices
        tokens_per_s = run.batch_size * run.seq_len / step_time_s
        chip = by_kind(devices[0].device_kind)
        peak = chip and chip.peak_flops
        share = tokens_per_s / (peak * len(devices)) if peak else None
        causal, palm = flops_per_token(run)
        return {
            "step_time_s": step_time_s,
            "tokens_per_s": tokens_per_s,
            "mfu": share and share * causal,
            "mfu_palm": share and share * palm,
            "peak_flops_per_device": peak,
        }

    def close(self) -> None:
        """Holds nothing."""


class PeakMemory:
    """The most memory that a device of this process has used."""

    def __init__(self, devices: list[Any]):
        self._devices = devices

    def read(self, step_time_s: float) -> dict[str, float | int | None]:
        """Returns bytes since the process began; None where devices do not count."""
        del step_time_s
        return {"peak_memory_bytes": peak_memory_bytes(self._devices)}

    def close(self) -> None:
        """Holds nothing."""


def peak_memory_bytes(devices: list[Any]) -> int | None:
    """Returns the peak bytes of this process's devices; None where not counted."""
    stats = [
        d.memory_stats() or {}
        for d in devices
        if d.process_index == jax.process_index()
    ]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None
