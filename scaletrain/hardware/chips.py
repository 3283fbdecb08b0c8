"""The table of the chips that runs use or are planned for, and its lookups.

A chip without a row has no MFU: a guess of its peak would be worse.
"""

from collections.abc import Mapping
from typing import Any

from scaletrain.hardware.chip import Chip
from scaletrain.hardware.gpus import GPUS
from scaletrain.hardware.tpus import TPUS

CHIPS = {chip.generation: chip for chip in (*TPUS, *GPUS)}
_BY_KIND = {kind: chip for chip in CHIPS.values() for kind in chip.device_kinds}


def by_kind(device_kind: str) -> Chip | None:
    """Returns the chip of a jax device's `device_kind`, or None without a row.

    Example:
      >>> by_kind("TPU v5").generation
      'v5p'
    """
    return _BY_KIND.get(device_kind)


def low_precision(device_kind: str) -> Mapping[str, float]:
    """Returns the speed of 8-bit matmuls over bf16, by format.

    A CPU has both formats at the speed of bf16: it emulates them, for tests.
    """
    if device_kind == "cpu":
        return {"fp8": 1, "int8": 1}
    chip = by_kind(device_kind)
    return chip.low_precision if chip else {}


def compiler_options(device_kind: str) -> dict[str, Any]:
    """Returns the compiler options of the train step on devices of a kind."""
    chip = by_kind(device_kind)
    return dict(chip.compiler_options) if chip else {}
