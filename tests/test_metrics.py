"""What is counted and how it is written."""

import dataclasses
import json
import math
import types

import jax
import pytest
import small
from flax import nnx

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


def test_a_run_goes_on_without_tensorboard(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(metrics, "SummaryWriter", refuse)
    recorder = metrics.Recorder(tmp_path, small.RUN, 0)
    recorder.write({"step": 1, "loss": 2.0})
    recorder.close()
    assert "no TensorBoard events (Read-only file system)" in capsys.readouterr().err
    assert '"loss": 2.0' in (tmp_path / "metrics.jsonl").read_text()
