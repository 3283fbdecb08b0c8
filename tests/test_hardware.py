"""The table of chips, and the slices that they form."""

import collections
import dataclasses
import os
import re
import sys

import pytest

from scaletrain import main
from scaletrain.errors import ConfigError
from scaletrain.hardware import chips, clouds, gpu_targets, slices
from scaletrain.hardware.chip import Figure
from scaletrain.hardware.chips import CHIPS
from scaletrain.plan import record

ROWS = pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
TPUS = [chip for chip in CHIPS.values() if chip.tpu]
GPUS = [name for name, chip in CHIPS.items() if chip.gpu]


def _figures(row):
    """Yields (name, figure) of a row and of what it consists of."""
    for field in dataclasses.fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Figure):
            yield field.name, value
        elif dataclasses.is_dataclass(value):
            yield from _figures(value)


def test_each_device_kind_names_one_chip():
    counts = collections.Counter(
        kind for chip in CHIPS.values() for kind in chip.device_kinds
    )
    assert set(counts.values()) == {1}
    for chip in CHIPS.values():
        assert all(chips.by_kind(kind) is chip for kind in chip.device_kinds)
    assert chips.by_kind("cpu") is None


def test_names_of_generations_and_of_clouds_name_one_chip():
    assert len(clouds.BY_NAME) == len(TPUS)
    for name, chip in clouds.BY_NAME.items():
        assert CHIPS.get(name, chip) is chip


@ROWS
def test_every_row_is_complete(chip):
    figures = dict(_figures(chip))
    assert {"peak_flops", "dollars", "watts", "host_watts"} <= figures.keys()
    for figure in figures.values():
        assert figure > 0
        assert len(figure.source) > 15
    for name, figure in figures.items():
        if name.endswith("efficiency"):
            assert figure < 1
    assert chip.device_kinds
    assert (chip.tpu is None) != (chip.gpu is None)
    assert chip.hbm_bytes <= chip.memory_bytes
    assert all(rate >= 1 for rate in chip.low_precision.values())
    # Devices multiply by hundreds what they read: other units would show.
    assert 100 < chip.peak_flops / chip.hbm_bytes_per_s < 1000
    size = chip.tpu.shapes[-1] if chip.tpu else 16
    slice_ = slices.parse(f"{chip.generation}:{size}")
    assert slice_.chip is chip
    assert all(value > 0 and unit is not None and len(source) > 15
               for _, value, unit, source in record.rates(slice_))  # fmt: skip


def test_links_between_slices_and_hosts_are_told_where_there_are_any():
    for name, words in (("v5p:4x4x4", "between slices"), ("h200:16", "between hosts")):
        rates = record.rates(slices.parse(name, 1 + name.startswith("v")))
        assert words in [each[0] for each in rates]
        alone = record.rates(slices.parse(name.replace("16", "8")))
        assert words not in [each[0] for each in alone]


@pytest.mark.parametrize("name", GPUS)
def test_the_compiler_and_the_plan_have_one_bandwidth(name):
    (told,) = re.findall(r"memory_bandwidth: (\d+)", gpu_targets.text(CHIPS[name]))
    assert int(told) == CHIPS[name].hbm_bytes_per_s


def test_an_a100_has_the_bandwidth_of_its_data_sheet():
    assert chips.by_kind("NVIDIA A100-SXM4-80GB").hbm_bytes_per_s == 2039e9


@pytest.mark.parametrize("name", GPUS)
def test_of_a_gpu_counts_what_a_run_may_allocate(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scaletrain", "--version"])
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    with pytest.raises(SystemExit):
        main.main()
    share = float(os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION"))
    sold = {"a100": 80, "h100": 80, "h200": 141, "b200": 180}[name] * 1e9
    whole = CHIPS[name].hbm_bytes / share
    assert sold <= whole <= 1.07 * sold  # 80 GB are somewhat more
    (told,) = re.findall(r"device_memory_size: (\d+)", gpu_targets.text(CHIPS[name]))
    assert whole == pytest.approx(int(told))  # the compiler's limits are of the same


@pytest.mark.parametrize(
    ("text", "name", "count", "devices"),
    [
        ("v5p:4x4x4", "v5p:4x4x4", 64, 64),
        ("v5p-128", "v5p:4x4x4", 64, 64),
        ("v5litepod-256", "v5e:16x16", 256, 256),
        ("v5p-512", "v5p:4x8x8", 256, 256),  # of its size the squarest
        ("v6e-8", "v6e:2x4", 8, 8),
        ("tpu7x:4x4x4", "tpu7x:4x4x4", 64, 128),
        ("h100:8", "h100:8", 8, 8),
    ],
)
def test_slices_have_their_names(text, name, count, devices):
    found = slices.parse(text)
    assert (found.name, found.chips, found.devices) == (name, count, devices)
    assert slices.parse(text, 2).chips == 2 * count if found.is_tpu else True


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("v5p:4x4x5", "the nearest is v5p:4x4x4"),
        ("v5p:4x4", "the nearest is v5p:2x2x4"),
        ("v5p:16x16", "the nearest is v5p:4x8x8"),
        ("v6e-100", "the nearest is v6e-"),
        ("v9:2x2", "unknown; write GENERATION:SHAPE"),
        ("h100:12", "hosts of 8, as h100:16"),
        ("nonsense", "unknown"),
    ],
)
def test_slices_that_do_not_exist_are_refused(text, words):
    with pytest.raises(ConfigError, match=words):
        slices.parse(text)


@pytest.mark.parametrize(
    ("name", "hosts"),
    [("v5e:2x4", 1), ("v6e:4x4", 4), ("v5p:2x2x1", 1), ("v5p:2x2x2", 2), ("h100:8", 1),
     ("h100:16", 2)],
)  # fmt: skip
def test_slices_have_their_hosts(name, hosts):
    assert slices.parse(name).hosts == hosts


def test_rings_are_told_to_the_compiler():
    wraps = {
        name: slices.parse(name).kwargs["wrap"]
        for name in ("v5p:4x4x4", "v5p:2x2x4", "v6e:16x16", "v5e:8x16", "v6e:4x4")
    }
    assert list(wraps.values()) == [
        (True,) * 3, (False,) * 3, (True, True, False), (False, True, False),
        (False,) * 3,
    ]  # fmt: skip
