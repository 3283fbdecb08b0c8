"""What an evaluation tells of a split."""

import json
import math
import sys

import jax
import pytest
import small

from scaletrain import evaluate, main, mesh, train
from scaletrain.commands.command import Result
from scaletrain.config import DataConfig
from scaletrain.record import finite


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Commands see one device."""
    build = mesh.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(mesh, "build", lambda axes: build(axes, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def unsplit(one_device, tmp_path_factory):
    """The settings and the workdir of a run without a validation split."""
    root = tmp_path_factory.mktemp("unsplit")
    (root / "a.txt").write_text("Some made-up text, and more. " * 60)
    run = small.changed(
        small.RUN,
        num_steps=1,
        batch_size=4,
        model__vocab_size=257,
        mesh__data=1,
        data=DataConfig(
            source="files",
            path=str(root / "*.txt"),
            validation_fraction=0.0,
            cache_dir=str(root / "cache"),
        ),
    )
    train.train(run, str(root / "run"))
    return run, str(root / "run")


def test_the_training_split_is_told_of_without_a_validation_split(unsplit):
    run, workdir = unsplit
    found = evaluate.evaluate_checkpoint(run, workdir, None, "train")
    text = "Some made-up text, and more. " * 60
    bits = found["loss"] * (len(text) + 1) / len(text) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits)
    shares = [(text.count(c) + 1) / (len(text) + 256) for c in text]
    order0 = -sum(map(math.log2, shares)) / len(text)
    assert found["bits_per_byte_order0"] == pytest.approx(order0)
    assert f"order 0 {order0:.3f}" in evaluate.in_words(found)


@pytest.mark.parametrize("parts", [1, 2])
def test_batches_of_an_evaluation_are_batches_however_they_are_computed(
    unsplit, parts, tmp_path
):
    run, workdir = unsplit
    for number in range(8):
        (tmp_path / f"{number}.txt").write_text(f"Text number {number}. " * 60)
    run = small.changed(
        run,
        accumulate_steps=parts,
        eval__num_batches=2,
        data__path=str(tmp_path / "*.txt"),
        data__validation_fraction=0.3,
    )
    assert (
        evaluate.evaluate_checkpoint(run, workdir, None, "train")["tokens"]
        == 2 * 4 * 32
    )


def test_what_is_not_finite_is_null_in_any_record():
    record = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, 2)}], "d": "nan"}
    assert finite(record) == {"a": None, "b": [1.5, None, {"c": [None, 2]}], "d": "nan"}


def test_json_on_standard_output_is_json(monkeypatch, capsys):
    """What the language does not have is refused by readers that keep to it."""

    def refuse(word):
        raise AssertionError(word)

    record = {"loss": math.nan, "of": [math.inf]}
    result = Result(record, "")
    small.replace_command(monkeypatch, "config", lambda run, args: result)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    path = "--config=experiments/quickstart.py"
    monkeypatch.setattr(sys, "argv", ["scaletrain", "config", path, "--json"])
    with pytest.raises(SystemExit):
        main.main()
    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert found == {"loss": None, "of": [None]}
