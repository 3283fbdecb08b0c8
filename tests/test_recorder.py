"""What is recorded of a run, and how it is written."""

import json
import math
import struct
import types

import pytest
import small
from tensorboardX.proto.event_pb2 import Event

from scaletrain.flops import flops_per_token
from scaletrain.monitor import recorder
from scaletrain.monitor.meter import Throughput
from scaletrain.monitor.recorder import Recorder
from scaletrain.workdir import Workdir


def test_mfu_is_told_for_known_chips_alone():
    run = small.changed(small.RUN, batch_size=8, seq_len=4096)
    known = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    found = Throughput(run, [known, known]).read(2.0)
    causal, palm = flops_per_token(run)
    assert found["mfu"] == pytest.approx(8 * 4096 / 2 * causal / (2 * 989e12))
    assert found["mfu_palm"] / found["mfu"] == pytest.approx(palm / causal)
    unknown = types.SimpleNamespace(device_kind="cpu")
    found = Throughput(run, [unknown]).read(2.0)
    assert (found["mfu"], found["mfu_palm"], found["peak_flops_per_device"]) == (
        None,
    ) * 3


def test_records_are_json_whatever_the_numbers(tmp_path):
    records = Recorder(Workdir(tmp_path), small.RUN, 0)
    records.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    records.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}


def test_resuming_drops_records_of_steps_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    Recorder(Workdir(tmp_path), small.RUN, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_progress_tells_speed_and_time_left(tmp_path, capsys):
    records = Recorder(Workdir(tmp_path), small.RUN, 0)
    record = {"step": 5, "loss": 1.23456, "tokens_per_s": 12345.6, "step_time_s": 6.0}
    records.progress(record | {"mfu": 0.456})
    records.progress(record | {"mfu": None})
    records.close()
    line = "step 5/20  loss 1.2346  12,346 tokens/s  MFU {}  ETA 1m30s\n"
    assert capsys.readouterr().err == line.format("45.6%") + line.format("n/a")


class Failing:
    """A file on a disk that is full until it is emptied."""

    def __init__(self, file):
        self.file, self.full = file, False

    def write(self, data):
        """Writes a part of it, as a disk that is about to be full does."""
        if self.full:
            raise OSError(28, "No space left on device")
        return self.file.write(data[:20])

    def flush(self):
        """Writes nothing."""

    def close(self):
        """Closes the file."""
        self.file.close()


def scalars(workdir):
    """Returns what TensorBoard's files say, by step and name."""
    found = {}
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            values = {v.tag: v.simple_value for v in event.summary.value}
            found[event.step] = found.get(event.step, {}) | values
            content = content[16 + size :]
    return found


def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(recorder, "Board", refuse)
    records = Recorder(Workdir(tmp_path), small.RUN, 0)
    records.write({"step": 1, "loss": 2.0})
    records.close()
    assert "no TensorBoard events (Read-only file system)" in capsys.readouterr().err
    assert '"loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()


def test_a_disk_that_fails_in_the_middle_is_told_of_once(tmp_path, capsys):
    records = Recorder(Workdir(tmp_path), small.RUN, 0)
    records._board._file = Failing(records._board._file)
    lines = records._file = Failing(records._file)
    for step in range(1, 101):
        lines.full = records._board._file.full = 3 < step < 90
        records.write({"step": step, "loss": 0.5 * step, "name": "no scalar"})
        if records._board is None:
            break
    for later in range(step + 1, 101):
        lines.full = later < 90
        records.write({"step": later, "loss": 0.5 * later, "name": "no scalar"})
    records.close()
    said = capsys.readouterr().err
    assert said.count("no TensorBoard events (No space left on device)") == 1
    assert said.count("metrics.jsonl; No space left on device; make room") == 1
    found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [r["loss"] for r in found] == [0.5 * step for step in range(1, 101)]


def test_tensorboard_reads_what_is_written(tmp_path):
    for start in (0, 2):  # within a second
        records = Recorder(Workdir(tmp_path), small.RUN, start)
        records.write({"step": start + 1, "loss": 1.5, "mfu": None, "name": "x"})
        records.close()
    found = scalars(tmp_path)
    assert (found[1], found[3]) == ({"loss": 1.5}, {"loss": 1.5})
