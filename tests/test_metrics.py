"""What is counted and how it is written."""

import dataclasses
import json
import math
import struct
import types

import jax
import pytest
import small
from flax import nnx
from tensorboardX.proto.event_pb2 import Event

from scaletrain import metrics
from scaletrain.config import PrecisionConfig
from scaletrain.models import Decoder


@pytest.mark.parametrize(
    "settings",
    [{}, {"head": "tied"}, {"mlp": "gelu", "bias": "all"}, {"num_kv_heads": 4}],
)
def test_matmul_weights_are_the_matrices_of_the_model(settings):
    model = dataclasses.replace(small.MODEL, **settings)
    params = nnx.state(Decoder(model, PrecisionConfig(), jax.random.key(0)))
    used = 0
    for path, leaf in nnx.to_flat_state(params):
        tied = path[-1] == "embedding" and model.head == "tied"
        used += leaf.size if path[-1] == "weight" or tied else 0
    assert metrics.matmul_weights(model) == used


def test_flops_of_llama_1b():
    """Against the sums done by hand."""
    model = dataclasses.replace(
        small.MODEL, num_layers=16, d_model=2048, num_heads=32, num_kv_heads=8,
        d_head=64, d_ff=8192, vocab_size=32_768,
    )  # fmt: skip
    weights = 16 * (2 * 2048**2 * 1.25 + 3 * 2048 * 8192) + 2048 * 32_768
    run = small.changed(small.RUN, model=model, seq_len=4096)
    causal, palm = metrics.flops_per_token(run)
    assert causal == 6 * weights + 6 * 16 * 2048 * 4096
    assert palm == 6 * weights + 12 * 16 * 2048 * 4096
    windowed = small.changed(run, model__sliding_window=1024)
    seen = sum(min(t + 1, 1024) for t in range(4096)) / 4096
    assert metrics.flops_per_token(windowed)[0] == pytest.approx(
        6 * weights + 12 * 16 * 2048 * seen, rel=1e-3
    )


def test_lines_that_are_no_records_are_passed_over(tmp_path):
    whole = [{"step": 1, "newest_saved": 1}, {"step": 2, "newest_saved": "x"}]
    others = ["3", "null", "[1]", '{"a": 1}', '{"step": "x"}', "{", ""]
    lines = [json.dumps(whole[0]), *others, json.dumps(whole[1]), '{"step": 3}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))  # the last is cut off
    assert metrics.records(tmp_path) == whole
    assert metrics.newest_saved(tmp_path) == 1
    assert metrics.newest_saved(tmp_path / "none") is None
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "newest_saved": 0}\n')
    assert metrics.newest_saved(tmp_path) == 0  # an import


def test_mfu_is_told_for_known_chips_alone():
    run = small.changed(small.RUN, batch_size=8, seq_len=4096)
    known = types.SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")
    found = metrics.throughput(run, 2.0, [known, known])
    causal, palm = metrics.flops_per_token(run)
    assert found["mfu"] == pytest.approx(8 * 4096 / 2 * causal / (2 * 989e12))
    assert found["mfu_palm"] / found["mfu"] == pytest.approx(palm / causal)
    unknown = types.SimpleNamespace(device_kind="cpu")
    found = metrics.throughput(run, 2.0, [unknown])
    assert (found["mfu"], found["mfu_palm"], found["peak_flops_per_device"]) == (
        None,
    ) * 3


def test_records_are_json_whatever_the_numbers(tmp_path):
    recorder = metrics.Recorder(tmp_path, small.RUN, 0)
    recorder.write({"step": 1, "loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    recorder.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}


def test_resuming_drops_records_of_steps_taken_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    metrics.Recorder(tmp_path, small.RUN, 2).close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_progress_tells_speed_and_time_left(tmp_path, capsys):
    recorder = metrics.Recorder(tmp_path, small.RUN, 0)
    record = {"step": 5, "loss": 1.23456, "tokens_per_s": 12345.6, "step_time_s": 6.0}
    recorder.progress(record | {"mfu": 0.456})
    recorder.progress(record | {"mfu": None})
    recorder.close()
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

    monkeypatch.setattr(metrics, "Board", refuse)
    recorder = metrics.Recorder(tmp_path, small.RUN, 0)
    recorder.write({"step": 1, "loss": 2.0})
    recorder.close()
    assert "no TensorBoard events (Read-only file system)" in capsys.readouterr().err
    assert '"loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()


def test_a_disk_that_fails_in_the_middle_is_told_of_once(tmp_path, capsys):
    recorder = metrics.Recorder(tmp_path, small.RUN, 0)
    recorder._board._file = Failing(recorder._board._file)
    lines = recorder._file = Failing(recorder._file)
    for step in range(1, 101):
        lines.full = recorder._board._file.full = 3 < step < 90
        recorder.write({"step": step, "loss": 0.5 * step, "name": "no scalar"})
        if recorder._board is None:
            break
    for later in range(step + 1, 101):
        lines.full = later < 90
        recorder.write({"step": later, "loss": 0.5 * later, "name": "no scalar"})
    recorder.close()
    said = capsys.readouterr().err
    assert said.count("no TensorBoard events (No space left on device)") == 1
    assert said.count("metrics.jsonl; No space left on device; make room") == 1
    found = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [r["loss"] for r in found] == [0.5 * step for step in range(1, 101)]


def test_tensorboard_reads_what_is_written(tmp_path):
    for start in (0, 2):  # within a second
        recorder = metrics.Recorder(tmp_path, small.RUN, start)
        recorder.write({"step": start + 1, "loss": 1.5, "mfu": None, "name": "x"})
        recorder.close()
    found = scalars(tmp_path)
    assert (found[1], found[3]) == ({"loss": 1.5}, {"loss": 1.5})
