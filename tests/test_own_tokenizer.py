"""A checkpoint is read with the tokenizer it was made with, and with no other."""

import json
import pathlib

import jax
import pytest
import small

from scaletrain import config, data, evaluate, generate, mesh, train
from scaletrain.checkpoint import warm_start
from scaletrain.config import DataConfig
from scaletrain.errors import ConfigError, DataError
from scaletrain.hf import exporter

TRAINED_ON = [f"the {animal} sat on the mat and slept " * 9 for animal in "abcdefgh"]
OTHER_TEXTS = [f"zwölf Boxkämpfer jagen {n} große Wölfe " * 9 for n in range(8)]
VOCAB = 300


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Commands see one device."""
    build = mesh.build
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "device_count", lambda: 1)
        patch.setattr(mesh, "build", lambda axes: build(axes, jax.devices()[:1]))
        yield


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def a_run(root, tokenizer="bpe", **changes):
    return small.changed(
        small.RUN,
        num_steps=1,
        model__vocab_size=VOCAB,
        mesh__data=1,
        data=DataConfig(
            source="files",
            path=rows(root / "train.jsonl", TRAINED_ON),
            tokenizer=tokenizer,
            validation_fraction=0.3,
            cache_dir=str(root / "cache"),
        ),
        **changes,
    )


@pytest.fixture(scope="module")
def bpe(one_device, tmp_path_factory):
    """The settings and the workdir of a run that trained its tokenizer."""
    root = tmp_path_factory.mktemp("bpe")
    run = a_run(root)
    train.run(run, str(root / "run"))
    return run, root / "run"


def on_other_texts(run, tmp_path, **changes):
    path = rows(tmp_path / "other.jsonl", OTHER_TEXTS)
    return small.changed(run, data__path=path, **changes)


def test_other_texts_are_evaluated_with_the_tokenizer_of_the_run(bpe, tmp_path):
    """As they are where its file is named; a tokenizer of their own has other ids."""
    run, workdir = bpe
    file = str(workdir / "tokenizer" / "tokenizer.json")
    named = on_other_texts(run, tmp_path, data__tokenizer=file)
    wanted = evaluate.run(named, str(workdir), None, "validation")
    found = evaluate.run(
        on_other_texts(run, tmp_path), str(workdir), None, "validation"
    )
    assert found == wanted
    trained_anew = data.prepare(on_other_texts(run, tmp_path), lambda line: None)
    own = data.load_tokenizer(workdir / "tokenizer")
    assert trained_anew.tokenizer.fingerprint != own.fingerprint


def test_a_run_begun_from_another_keeps_its_tokenizer(bpe, tmp_path):
    run, workdir = bpe
    begun = on_other_texts(run, tmp_path, init_from=str(workdir))
    train.run(begun, str(tmp_path / "b"))
    file = pathlib.Path("tokenizer", "tokenizer.json")
    assert (tmp_path / "b" / file).read_bytes() == (workdir / file).read_bytes()


@pytest.mark.parametrize("tokenizer", ["bytes", "file"])
def test_a_tokenizer_of_other_ids_is_refused(bpe, tmp_path, tokenizer):
    run, workdir = bpe
    if tokenizer == "file":
        data.prepare(on_other_texts(run, tmp_path), print).tokenizer.save(tmp_path)
        tokenizer = str(tmp_path / "tokenizer.json")
    other = on_other_texts(run, tmp_path, data__tokenizer=tokenizer)
    refused = pytest.raises(ConfigError, match="know; set it back to 'bpe'")
    begun = small.changed(other, init_from=str(workdir))
    sampling, to = generate.Sampling(temperature=0.0), tmp_path / "out"
    with refused:
        evaluate.run(other, str(workdir), None, "validation")
    with refused:
        train.run(begun, str(tmp_path / "b"))
    with refused:
        generate.run(other, str(workdir), None, ["the"], sampling, 0)
    with refused:
        exporter.export_checkpoint(other, str(workdir), str(to), None, "", merge=False)
    assert not to.exists()


def test_the_copy_in_the_workdir_counts_when_the_file_is_another_or_gone(bpe, tmp_path):
    """For evaluation, for going on in the workdir and for beginning from it."""
    own = data.load_tokenizer(bpe[1] / "tokenizer")
    own.save(tmp_path / "t")
    file = tmp_path / "t" / "tokenizer.json"
    run, workdir = a_run(tmp_path, tokenizer=str(file)), tmp_path / "run"
    train.run(run, str(workdir))
    before = evaluate.run(run, str(workdir), None, "validation")
    data.prepare(on_other_texts(bpe[0], tmp_path), print).tokenizer.save(tmp_path / "t")
    assert evaluate.run(run, str(workdir), None, "validation") == before
    file.unlink()
    assert evaluate.run(run, str(workdir), None, "validation") == before
    train.run(small.changed(run, num_steps=2), str(workdir))
    begun = small.changed(run, init_from=str(workdir))
    train.run(begun, str(tmp_path / "b"))
    for folder in (workdir, tmp_path / "b"):
        found = data.load_tokenizer(folder / "tokenizer")
        assert found.fingerprint == own.fingerprint


def test_more_tokens_and_a_chat_template_are_another_tokenizer_of_the_same_ids(
    bpe, tmp_path
):
    run, workdir = bpe
    content = json.loads((workdir / "tokenizer" / "tokenizer.json").read_text())
    turn = {**content["added_tokens"][0], "id": VOCAB - 1, "content": "<turn>"}
    content["added_tokens"].append(turn)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    named = small.changed(run, data__tokenizer=str(tmp_path / "tokenizer.json"))
    found = warm_start.tokenizer_of(workdir, named)
    assert found.fingerprint == data.read_tokenizer(named.data).fingerprint


def test_no_tokenizer_is_trained_for_weights_that_came_without_one(tmp_path):
    random = small.changed(small.RUN, num_steps=1, mesh__data=1)
    (tmp_path / "config.json").write_text(config.to_json(random))
    assert warm_start.tokenizer_of(tmp_path, random) is None
    with pytest.raises(ConfigError, match="data.tokenizer='bpe'; .* give the path"):
        warm_start.tokenizer_of(tmp_path, a_run(tmp_path))


def test_a_tokenizer_that_is_gone_is_told(tmp_path):
    (tmp_path / "config.json").write_text(config.to_json(a_run(tmp_path)))
    with pytest.raises(DataError, match="tokenizer; no tokenizer can be read there"):
        warm_start.tokenizer_of(tmp_path, a_run(tmp_path))


def test_what_a_tokenizer_was_trained_for_is_not_tokenised_again(bpe):
    run, workdir = bpe

    def unexpected(line):
        raise AssertionError(line)

    own = data.load_tokenizer(workdir / "tokenizer")
    kept = data.prepare(run, unexpected)
    assert data.prepare(run, unexpected, own).fingerprint == kept.fingerprint
