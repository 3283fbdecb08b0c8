"""Published checkpoints: what transformers made comes in, computes the same, goes out.

tests/reference/make.py made the models and what they compute, with torch.
"""

import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from scaletrain import checkpoint, config, data, evaluate, generate, mesh, step, train
from scaletrain.checkpoint import warm_start
from scaletrain.data.tokenizers import JsonTokenizer
from scaletrain.errors import CheckpointError, ConfigError, DataError
from scaletrain.hf import exporter, families, importer, safetensors
from scaletrain.models import Decoder
from scaletrain.program import build
from scaletrain.workdir import Workdir

REFERENCE = pathlib.Path(__file__).parent / "reference"
FAMILIES = [
    "llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gpt2",
    "olmo2", "phi3",
]  # fmt: skip


def settings(workdir, **changes):
    """Returns the settings in a workdir, for all devices or as changed."""
    run = config.from_json((pathlib.Path(workdir) / "config.json").read_text())
    return small.changed(run, **changes)


@pytest.fixture(scope="session")
def imported(tmp_path_factory):
    """Returns a function from a reference's name to its workdir, on 8 devices."""
    root, made = tmp_path_factory.mktemp("imported"), set()

    def workdir(name):
        if name not in made:
            importer.import_checkpoint(str(REFERENCE / name), str(root / name), [])
            made.add(name)
        return str(root / name)

    return workdir


def logits(workdir, tokens, tmp_path, **changes):
    """Returns what `eval --tokens --save_logits` writes."""
    np.save(tmp_path / "tokens.npy", tokens)
    out = str(tmp_path / "logits.npy")
    run = settings(workdir, **changes)
    evaluate.score(run, workdir, None, str(tmp_path / "tokens.npy"), out)
    return np.load(out)


def stored(folder):
    """Returns the tensors of a folder by name."""
    found = safetensors.contents(pathlib.Path(folder))
    return {name: each.read() for name, each in found.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_computes_what_transformers_computes(name, imported, tmp_path):
    """Rows of unequal lengths, past windows and past the original rope range."""
    wanted = np.load(REFERENCE / name / "reference.npz")
    found = logits(imported(name), wanted["tokens"], tmp_path)
    assert found.dtype == np.float32
    for row, length in enumerate(wanted["lengths"]):
        np.testing.assert_allclose(
            found[row, :length], wanted["logits"][row, :length], atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_continues_as_transformers_continues(name, imported):
    """Greedy decoding through the key/value cache, 32 tokens."""
    wanted = np.load(REFERENCE / name / "reference.npz")
    run = settings(imported(name), precision__compute="float32")
    sampling = generate.Sampling(temperature=0.0, max_new_tokens=32)
    prompts = [wanted["prompt"].tolist()]
    found = generate.run(run, imported(name), None, prompts, sampling, 0)
    assert found[0]["ids"] == wanted["greedy"].tolist()


@pytest.mark.parametrize("name", FAMILIES)
def test_goes_out_as_it_came(name, imported, tmp_path):
    """Names, formats and bits of every tensor, and the settings."""
    to = tmp_path / "out"
    exporter.export_checkpoint(
        settings(imported(name)), imported(name), str(to), None, "", merge=False
    )
    then, now = stored(REFERENCE / name), stored(to)
    assert then.keys() == now.keys()
    for tensor, value in then.items():
        assert value.dtype == now[tensor].dtype
        assert value.tobytes() == now[tensor].tobytes(), tensor
    told, asked = (
        families.of_config(json.loads((folder / "config.json").read_text()))
        for folder in (to, REFERENCE / name)
    )
    assert told == asked
    assert f"{told[0].name} model" in (to / "README.md").read_text()


def test_a_format_can_be_asked_for(imported, tmp_path, monkeypatch):
    to, compared = tmp_path / "out", []
    verify = checkpoint.Store.verify

    def counted(self, step):
        compared.append(step)
        verify(self, step)

    monkeypatch.setattr(checkpoint.Store, "verify", counted)
    run = settings(imported("qwen3"))
    exporter.export_checkpoint(
        run, imported("qwen3"), str(to), None, "bfloat16", merge=False
    )
    assert compared == [0]  # all files are read for it, so once
    then, now = stored(REFERENCE / "qwen3"), stored(to)
    for tensor, value in then.items():
        assert now[tensor].tobytes() == value.astype("bfloat16").tobytes()


def test_shards_are_read_and_written(imported, tmp_path):
    """An index and its files; one tensor larger than a file may be stays whole."""
    first = stored(REFERENCE / "qwen3_sharded")
    kinds = {name: (value.shape, value.dtype) for name, value in first.items()}
    safetensors.write(tmp_path, kinds, first.__getitem__, shard_bytes=20_000)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = stored(tmp_path)
    assert {n: v.tobytes() for n, v in first.items()} == {
        n: v.tobytes() for n, v in again.items()
    }
    weights = checkpoint_weights(imported("qwen3_sharded"))
    np.testing.assert_array_equal(
        weights["embedding"], first["model.embed_tokens.weight"]
    )


def checkpoint_weights(workdir):
    run = config.resolve(settings(workdir), jax.device_count())
    grid = mesh.build(run.mesh)
    with jax.set_mesh(grid):
        program = build(run, grid)
        _, weights = warm_start.weights_of(workdir, run, None, program.state)
    return jax.device_get(checkpoint.flat(weights))


def test_gradients_equal_torch_autograd(imported):
    """The loss and the gradient of every parameter, of one family, in float32."""
    wanted = np.load(REFERENCE / "llama3" / "gradients.npz")
    workdir = imported("llama3")
    run = settings(workdir, precision__compute="float32", seq_len=64)
    run = config.resolve(run, jax.device_count())
    grid = mesh.build(run.mesh)
    program = build(run, grid)
    batch = {name: wanted[name] for name in ("tokens", "targets", "weights")}
    B, T = batch["tokens"].shape
    batch["positions"] = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    batch["segments"] = np.ones((B, T), np.int32)
    batch = {name: jnp.asarray(rows) for name, rows in batch.items()}
    batch["key"] = jax.random.split(jax.random.key(0), B)
    with jax.set_mesh(grid):
        _, params = warm_start.weights_of(workdir, run, None, program.state)
    # One device: a batch of two does not divide over eight.
    params = jax.tree.map(np.asarray, jax.device_get(params))

    def mean(params):
        loss, sums = step._objective(params, {}, {}, batch, program=program)
        return loss / sums.weight

    loss, grads = jax.jit(jax.value_and_grad(mean))(params)
    np.testing.assert_allclose(loss, wanted["loss"], rtol=1e-5)
    flat, seen = checkpoint.flat(grads), 0
    for entry in families.entries(families.FAMILIES["llama"], run.model, flat):
        found = entry.join(lambda piece: np.asarray(flat[piece.path][piece.index]))
        theirs = wanted[f"gradient/{entry.name}"]
        error = np.abs(found - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4, (entry.name, error)
        seen += 1
    assert seen == len(stored(REFERENCE / "llama3"))


def test_training_from_an_import_is_the_same_on_any_mesh(imported):
    """Ten steps on 2 x 2 x 2 devices and on one, from the same weights."""
    workdir = imported("qwen2")

    def losses(**axes):
        run = settings(
            workdir,
            batch_size=8,
            seq_len=32,
            num_steps=10,
            precision__compute="float32",
            optim__learning_rate=1e-2,
            optim__warmup_steps=0,
            mesh=config.MeshConfig(**axes),
        )
        taken = small.Taken(run)
        with jax.set_mesh(taken.mesh):
            _, params = warm_start.weights_of(workdir, run, None, taken.program.state)
        taken.state = dataclasses.replace(taken.state, params=params)
        return taken.losses(10)

    one, eight = losses(), losses(data=2, fsdp=2, tensor=2)
    np.testing.assert_allclose(eight, one, rtol=1e-5)
    assert one[-1] < one[0]


def test_a_run_goes_on_from_an_import(imported, tmp_path):
    """Step 0 is the import and stays; later steps have an optimizer."""
    workdir = tmp_path / "run"
    shutil.copytree(imported("llama"), workdir)
    run = settings(
        workdir,
        num_steps=4,
        batch_size=8,
        seq_len=16,
        optim__warmup_steps=0,
        optim__schedule="constant",  # one program for both runs
        checkpoint__every_steps=1,
        checkpoint__keep=2,
        log_every_steps=1,
        data__source="synthetic",
    )
    before = checkpoint_weights(workdir)
    train.run(run, str(workdir))
    kept = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.is_dir()}
    assert kept == {0, 3, 4}
    after = checkpoint_weights(workdir)
    assert not np.array_equal(before["embedding"], after["embedding"])
    other = small.changed(run, init_from=str(workdir), num_steps=1)
    train.run(other, str(tmp_path / "other"))
    named = settings(tmp_path / "other").init_from
    assert named == f"{workdir}@4"
    first = json.loads(
        (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()[0]
    )
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[0])
    assert first["loss"] != last["loss"]


def broken(name, change, folder):
    """Returns a copy of a reference after `change` of its folder."""
    shutil.copytree(REFERENCE / name, folder)
    change(folder)
    return folder


def edited(**keys):
    def change(folder):
        path = folder / "config.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, **keys}))

    return change


def indexed(function):
    def change(folder):
        path = folder / safetensors.INDEX
        found = json.loads(path.read_text())
        function(found["weight_map"])
        path.write_text(json.dumps(found))

    return change


def cut(name, size):
    def change(folder):
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return change


def renamed(old, new):
    """Renames a tensor inside the header, which keeps its length."""

    def change(folder):
        path = folder / safetensors.SINGLE
        path.write_bytes(path.read_bytes().replace(old, new, 1))

    return change


def headed(function):
    """Changes the header of a file, and what comes after it, by `function`."""

    def change(folder, name=safetensors.SINGLE):
        path = folder / name
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
        text, body = function(header, body)
        path.write_bytes(len(text).to_bytes(8, "little") + text + body)

    return change


def changed_entry(**values):
    def function(header, body):
        header["lm_head.weight"].update(values)
        return json.dumps(header).encode(), body

    return headed(function)


def copied(name, other):
    """Stores a tensor under one more name."""

    def function(header, body):
        start, stop = header[name]["data_offsets"]
        at = [len(body), len(body) + stop - start]
        text = json.dumps(header)[:-1] + f', "{other}": '
        text += json.dumps({**header[name], "data_offsets": at}) + "}"
        return text.encode(), body + body[start:stop]

    return headed(function)


def in_both_shards(folder):
    """Stores one tensor of the first shard in the second too, as zeros."""
    one, two = sorted(folder.glob("model-*.safetensors"))
    tensor = next(iter(safetensors._header(one).values()))
    entry = {"dtype": "F32", "shape": list(tensor.shape)}

    def function(header, body):
        more = bytes(safetensors.nbytes(tensor.shape, np.dtype(np.float32)))
        header[tensor.name] = entry | {
            "data_offsets": [len(body), len(body) + len(more)]
        }
        return json.dumps(header).encode(), body + more

    headed(function)(folder, two.name)


def only_a_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def written(name, text):
    return lambda folder: (folder / name).write_bytes(text)


def first_shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[0]


BROKEN = [
    ("llama", cut("model.safetensors", 5000), "model.safetensors.*cut off"),
    ("llama", cut("model.safetensors", 100), "model.safetensors; not a safetensors"),
    ("llama", cut("config.json", 30), "config.json; it cannot be read"),
    ("llama", lambda f: (f / "config.json").unlink(), "config.json; missing; fetch"),
    ("llama", lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    (
        "qwen3_sharded",
        lambda f: (f / safetensors.INDEX).unlink(),
        "index.json; missing",
    ),
    ("qwen3_sharded", lambda f: first_shard(f).unlink(), "model-00001-of.*; missing"),
    (
        "qwen3_sharded",
        indexed(lambda m: m.update({"model.norm.weight": "../../secret.safetensors"})),
        "leads outside its folder, to '../../secret.safetensors'",
    ),
    (
        "qwen3_sharded",
        indexed(lambda m: m.update({"model.extra.weight": sorted(m.values())[0]})),
        "tensor model.extra.weight is not in it",
    ),
    (
        "qwen3_sharded",
        indexed(lambda m: m.pop("model.norm.weight")),
        "tensor model.norm.weight is not in model.safetensors.index.json",
    ),
    ("llama", edited(model_type="mamba"), "model_type='mamba'; no family"),
    (
        "llama",
        edited(intermediate_size=96),
        r"layers.0.mlp.down_proj.weight of model.safetensors: \[32, 88\] where "
        r"config.json asks for \[32, 96\]",
    ),
    (
        "llama",
        renamed(b"model.norm.weight", b"model.nora.weight"),
        "model.nora.weight of model.safetensors: not in this model\n.*"
        "model.norm.weight: missing",
    ),
    ("llama", renamed(b'"BF16"', b'"I128"'), "holds I128; only F32, F16, BF16"),
    (
        "llama",
        edited(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}),
        "rope_scaling.rope_type='yarn'; not supported; known: 'default', 'linear'",
    ),
    ("llama", edited(hidden_size=None), "hidden_size; missing; the model needs it"),
    ("llama", edited(mystery_gate=3), "mystery_gate=3; scaletrain does not know"),
    ("llama", edited(attention_bias=True), "attention_bias=True; not supported"),
    ("qwen2", edited(use_sliding_window=True), "use_sliding_window=True; not supp"),
    (
        "gemma2",
        edited(layer_types=["full_attention", *["sliding_attention"] * 3]),
        "layer_types=.*; not supported; every n-th",
    ),
    ("llama", edited(num_key_value_heads=3), "num_kv_heads=3; does not divide"),
    ("llama", only_a_pickle, "pytorch_model.bin; a pickle, which can run .*; fetch"),
    ("llama", written("config.json", b"[" * 99_999), "config.json; .* too deeply"),
    ("llama", written("config.json", b'{"a": "\xff"}'), "config.json; .*'utf-8'"),
    ("llama", written("config.json", b"[]"), "config.json; .*not a JSON object"),
    ("llama", edited(extra="x" * 99_999), "extra='x{150,250}\\.\\.\\.; scaletrain"),
    ("llama", written("generation_config.json", b"{"), "generation_config.json; it"),
    ("llama", edited(num_attention_heads=0, head_dim=None), "head_dim; it cannot be"),
    ("gpt2", edited(n_head=0), "model.d_head; it cannot be told"),
    ("llama", edited(hidden_size=32.5), "hidden_size=32.5; not a whole number"),
    ("llama", edited(hidden_size=float("inf")), "hidden_size=inf; not a whole number"),
    ("llama", edited(rms_norm_eps="small"), "rms_norm_eps='small'; not a usable"),
    ("llama", edited(tie_word_embeddings=[]), r"tie_word_embeddings=\[\]; not supp"),
    ("llama", edited(rope_scaling="yarn"), "rope_scaling='yarn'; not an object"),
    ("gemma2", edited(layer_types=5), "layer_types=5; not a list"),
    (
        "gemma2",
        edited(layer_types=["sliding_attention"]),
        "layer_types=.*; not a list for num_hidden_layers=4",
    ),
    (
        "llama",
        edited(tie_word_embeddings=True),
        "lm_head.weight of model.safetensors: other numbers than model.embed_tokens",
    ),
    (
        "llama",
        changed_entry(dtype="F8_E4M3", shape=[192, 32]),
        "lm_head.weight holds F8_E4M3; only",
    ),
    ("llama", edited(pruned_heads={"0": [1]}), "pruned_heads={'0': .*; scaletrain"),
    ("llama", edited(quantization_config={"bits": 4}), "quantization_config=.*; scal"),
    ("llama", edited(rope_interleaved=True), "rope_interleaved=True; scaletrain"),
    ("llama", changed_entry(shape=[96.5, 32]), "its header cannot be read: tensor lm_"),
    (
        "llama",
        headed(lambda header, body: (b"[" * 99_999, body)),
        "header cannot be read: it nests too deeply",
    ),
    (
        "llama",
        copied("model.norm.weight", "model.norm.weight"),
        "header cannot be read: model.norm.weight is there twice",
    ),
    (
        "gpt2",
        copied("transformer.wte.weight", "wte.weight"),
        "wte.weight: the same tensor as transformer.wte.weight",
    ),
    (
        "qwen3_sharded",
        in_both_shards,
        "model-00002-of.*; tensor .* is in model-00001-of-00002.safetensors by",
    ),
]


@pytest.mark.parametrize("name", FAMILIES)
def test_keys_that_say_nothing_of_the_model_change_nothing(name):
    """Of who wrote the file, and of how the model was loaded, trained or sampled."""
    about = json.loads((REFERENCE / name / "config.json").read_text())
    more = {
        "_attn_implementation_autoset": True,
        "_flash_attn_2_enabled": True,
        "unsloth_version": "2025.1",
        "unsloth_fixed": True,
        "transformers.js_config": {"dtype": "q4"},
        "is_llama_config": True,
        "model_max_length": 4096,
        "unk_token_id": 0,
        "num_labels": 2,
        "_num_labels": 1,
        "predict_special_tokens": True,
        "hidden_dropout_prob": 0.1,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "temperature": 1.0,
        "max_length": 20,
        "repetition_penalty": 1.0,
        "_pre_quantization_dtype": "bfloat16",
        "_commit_hash": "0" * 40,
    }
    assert families.of_config(about | more) == families.of_config(about)


def added(name, tensor, kind):
    """Stores one more tensor behind the others."""

    def function(header, body):
        raw = tensor.tobytes()
        header[name] = {
            "dtype": kind,
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        return json.dumps(header).encode(), body + raw

    return headed(function)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("U8", "u1"), ("BOOL", "?"), ("I64", "i8"), ("F32", "f4")]
)
def test_a_tensor_that_is_left_out_may_have_any_format(kind, dtype, tmp_path):
    mask = np.tril(np.ones((8, 8))).astype(dtype)
    change = added("transformer.h.0.attn.bias", mask, kind)
    importer.import_checkpoint(
        str(broken("gpt2", change, tmp_path / "in")), str(tmp_path / "w"), []
    )
    wanted, found = stored(REFERENCE / "gpt2"), checkpoint_weights(tmp_path / "w")
    np.testing.assert_array_equal(found["embedding"], wanted["transformer.wte.weight"])


def test_a_tied_matrix_may_be_stored_as_the_head_alone(tmp_path):
    def function(header, body):
        header["lm_head.weight"] = header.pop("model.embed_tokens.weight")
        return json.dumps(header).encode(), body

    folder = broken("llama3", headed(function), tmp_path / "in")
    importer.import_checkpoint(str(folder), str(tmp_path / "w"), [])
    np.testing.assert_array_equal(
        checkpoint_weights(tmp_path / "w")["embedding"],
        stored(REFERENCE / "llama3")["model.embed_tokens.weight"],
    )


def test_a_number_that_a_format_does_not_have_is_told_and_nothing_is_left(tmp_path):
    def function(header, body):
        start, _ = header["model.norm.weight"]["data_offsets"]
        large = np.array(1e5, "bfloat16").tobytes()
        return json.dumps(header).encode(), body[:start] + large + body[start + 2 :]

    folder = broken("llama", headed(function), tmp_path / "in")
    workdir, to = str(tmp_path / "w"), tmp_path / "to" / "out"
    importer.import_checkpoint(str(folder), workdir, [])
    words = (
        "--dtype=float16; it goes up to 65504, and model.norm.weight has 99840; .*16"
    )
    with pytest.raises(CheckpointError, match=words) as caught:
        exporter.export_checkpoint(
            settings(workdir), workdir, str(to), None, "float16", merge=False
        )
    assert caught.value.exit_code == 2
    assert not list(to.parent.glob("*"))
    exporter.export_checkpoint(
        settings(workdir), workdir, str(to), None, "", merge=False
    )
    assert stored(to)["model.norm.weight"][0] == 99840


def test_each_end_that_a_checkpoint_names_ends_a_text(imported, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(imported("llama"), workdir)
    wanted = np.load(REFERENCE / "llama" / "reference.npz")
    greedy = wanted["greedy"].tolist()
    ends = {"eos_token_id": [2, greedy[5]]}
    (workdir / "tokenizer" / "generation_config.json").write_text(json.dumps(ends))
    run = settings(workdir, precision__compute="float32")
    sampling = generate.Sampling(temperature=0.0, max_new_tokens=32)
    prompts = [wanted["prompt"].tolist()]
    found = generate.run(run, str(workdir), None, prompts, sampling, 0)
    assert found[0]["ids"] == greedy[: greedy.index(greedy[5])]


@pytest.mark.parametrize(
    ("prompt", "words"), [("the", "the brown"), ("", "brown"), ("the brown", None)]
)
def test_the_space_between_prompt_and_answer_is_printed(
    prompt, words, imported, tmp_path, monkeypatch
):
    """By decoders that leave out the first space of what they are given too."""
    vocabulary = {"</s>": 0, "\u2581the": 1, "\u2581brown": 2}
    library = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    library.pre_tokenizer = pre_tokenizers.Metaspace()
    library.decoder = decoders.Metaspace()
    workdir = tmp_path / "run"
    shutil.copytree(imported("llama"), workdir)
    JsonTokenizer(library.to_str()).save(workdir / "tokenizer")
    monkeypatch.setattr(generate, "generate", lambda *args, **kwargs: [[2]])
    found = generate.run(
        settings(workdir), str(workdir), None, [prompt], generate.Sampling(), 0
    )
    assert generate.in_words(found[0]) == (words or f"{prompt} brown")


@pytest.mark.parametrize(("name", "change", "words"), BROKEN)
def test_broken_checkpoints_are_refused_whole(name, change, words, tmp_path):
    folder = broken(name, change, tmp_path / "in")
    with pytest.raises((CheckpointError, ConfigError), match=f"(?s){words}") as caught:
        importer.import_checkpoint(str(folder), str(tmp_path / "w"), [])
    assert caught.value.exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


def test_nothing_is_left_of_an_import_that_fails_late(tmp_path, monkeypatch):
    """A disk that fills up while the weights are written."""

    def full(self, weights):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.Store, "save_weights", full)
    with pytest.raises(CheckpointError, match="No space left"):
        importer.import_checkpoint(str(REFERENCE / "llama"), str(tmp_path / "w"), [])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    imported, tmp_path, monkeypatch
):
    workdir, full = imported("llama"), types.SimpleNamespace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(CheckpointError, match=r"--workdir=.*w; [\d,]+ bytes .* 0 are"):
        importer.import_checkpoint(str(REFERENCE / "llama"), str(tmp_path / "w"), [])
    assert not list(tmp_path.iterdir())
    tokens = np.zeros((2, 8), np.int32)
    with pytest.raises(CheckpointError, match=r"--save_logits=.*; 6,144 bytes"):
        logits(workdir, tokens, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.npy"]


def test_nothing_is_left_where_writes_outlive_an_import(tmp_path, monkeypatch):
    """Orbax raises at the first write that fails; others may still be under way."""

    def full(self, weights):
        late = self.folder / "0.orbax-checkpoint-tmp"
        threading.Timer(0.05, lambda: late.mkdir(parents=True)).start()
        raise CheckpointError("full")

    monkeypatch.setattr(checkpoint.Store, "save_weights", full)
    with pytest.raises(CheckpointError, match="full"):
        importer.import_checkpoint(str(REFERENCE / "llama"), str(tmp_path / "w"), [])
    time.sleep(0.1)
    assert not list(tmp_path.iterdir())


def test_an_import_that_was_killed_can_be_repeated(tmp_path):
    """What it left has no name of a workdir, and the next one clears it away."""
    left = tmp_path / ".w.importing" / "checkpoints" / "0"
    left.mkdir(parents=True)
    (left / "half").write_text("half")
    importer.import_checkpoint(str(REFERENCE / "llama"), str(tmp_path / "w"), [])
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    assert not list((tmp_path / "w").rglob("half"))


def test_a_file_that_changes_under_the_import_is_named(tmp_path):
    folder = broken("llama", lambda f: None, tmp_path / "in")
    found = safetensors.contents(folder)["model.norm.weight"]
    cut(safetensors.SINGLE, 5000)(folder)
    with pytest.raises(CheckpointError, match="model.safetensors; tensor model.norm"):
        found.read()


@pytest.mark.parametrize("asked", [[], [("data.end_of_text", "<|stop|>")]])
def test_an_end_of_text_that_no_file_names_can_be_given(asked, tmp_path):
    folder = broken("llama", lambda f: None, tmp_path / "in")
    library = Tokenizer(models.WordLevel({"<|stop|>": 0, "a": 1}, unk_token="a"))
    library.save(str(folder / "tokenizer.json"))
    workdir = tmp_path / "w"
    if asked:
        importer.import_checkpoint(str(folder), str(workdir), asked)
        assert data.load_tokenizer(workdir / "tokenizer").end_id == 0
    else:
        with pytest.raises(DataError, match="set data.end_of_text to the token"):
            importer.import_checkpoint(str(folder), str(workdir), asked)
        assert not workdir.exists()


UNSCORED = [
    (np.zeros((1, 129), np.int32), "129 tokens a row; give 128 or fewer"),
    (np.full((1, 8), 96), "ids outside 0 to 95"),
    (np.full((1, 8), -1), "ids outside 0 to 95"),
    (np.zeros((1, 8)), r"float64 \[1, 8\]; give integers"),
    (np.zeros(8, np.int32), r"int32 \[8\]; give integers"),
    (np.zeros((0, 8), np.int32), r"\[0, 8\] holds nothing to predict"),
    (np.array([[{}]], object), "no numbers are in it; give an .npy file"),
    (b"", "no numbers are in it; give an .npy file"),
    (b"hello", "no numbers are in it; give an .npy file"),
]


@pytest.mark.parametrize(("content", "words"), UNSCORED)
def test_ids_that_cannot_be_scored_are_told(content, words, imported, tmp_path):
    path, workdir = tmp_path / "tokens.npy", imported("gpt2")
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.save(path, content)
    with pytest.raises(DataError, match=f"--tokens={path}; .*{words}"):
        evaluate.score(settings(workdir), workdir, None, str(path), None)


def test_logits_appear_whole_or_not_at_all(imported, tmp_path):
    np.savez(tmp_path / "two.npz", one=np.zeros((1, 8), np.int32))
    workdir = imported("gpt2")
    run = settings(workdir)
    with pytest.raises(DataError, match="two.npz; an archive of arrays"):
        evaluate.score(run, workdir, None, str(tmp_path / "two.npz"), None)
    (tmp_path / "taken").mkdir()
    np.save(tmp_path / "tokens.npy", np.zeros((1, 128), np.int32))
    given = str(tmp_path / "tokens.npy"), str(tmp_path / "taken")
    with pytest.raises(DataError, match="--save_logits=.*taken; Is a directory"):
        evaluate.score(run, workdir, None, *given)
    there = sorted(p.name for p in tmp_path.iterdir())
    assert there == ["taken", "tokens.npy", "two.npz"]


def test_text_beyond_the_learned_positions_is_refused(imported):
    run, workdir = settings(imported("gpt2")), imported("gpt2")

    def ask(prompts, new, seed=0):
        sampling = generate.Sampling(temperature=0.0, max_new_tokens=new)
        return generate.run(run, workdir, None, prompts, sampling, seed)

    words = "(?s)prompt_ids=-1; not ids.*--max_new_tokens=126; .*; give 125 or fewer"
    with pytest.raises(ConfigError, match=words):
        ask([[1, 2, 3], [-1]], 126)
    with pytest.raises(ConfigError, match="--max_new_tokens=1; .*; shorten it"):
        ask([[1] * 128], 1)
    with pytest.raises(ConfigError, match="--seed=-1; outside 0 to"):
        ask([[1]], 1, seed=-1)
    assert len(ask([[1] * 127], 1)[0]["ids"]) == 1


def test_places_that_are_taken_are_refused(imported, tmp_path):
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="w; it is not empty"):
        importer.import_checkpoint(str(REFERENCE / "llama"), str(tmp_path / "w"), [])
    workdir = imported("llama")
    with pytest.raises(ConfigError, match="w; it is not empty"):
        exporter.export_checkpoint(
            settings(workdir), workdir, str(tmp_path / "w"), None, "", merge=False
        )
    with pytest.raises(ConfigError, match="--merge; the run has no adapters"):
        exporter.export_checkpoint(
            settings(workdir), workdir, str(tmp_path / "x"), None, "", merge=True
        )
    assert (tmp_path / "w" / "notes.txt").read_text() == "mine"


def test_a_model_that_no_family_has_is_told_why(imported, tmp_path):
    workdir = imported("llama")
    run = settings(workdir, family="", model__mlp="relu2")
    with pytest.raises(CheckpointError, match="gpt2: .*llama: model.mlp='relu2'|relu2"):
        exporter.export_checkpoint(
            run, workdir, str(tmp_path / "x"), None, "", merge=False
        )


OLDER = {
    "rope_parameters": None,
    "rope_theta": 500.0,
    "rope_scaling": {
        "type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}


def test_older_spellings_mean_the_same():
    path = REFERENCE / "llama3" / "config.json"
    now = json.loads(path.read_text())
    assert families.of_config({**now, **OLDER}) == families.of_config(now)
    now = json.loads((REFERENCE / "gemma3" / "config.json").read_text())
    older = {k: v for k, v in now.items() if k not in ("layer_types",)}
    assert families.of_config(older) == families.of_config(now)
    nested = {"model_type": "gemma3", "text_config": now, "vision_config": {"a": 1}}
    assert families.of_config(nested) == families.of_config(now)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_place_and_every_place_a_parameter(name):
    """Reading back what was written gives each parameter of random weights."""
    found = json.loads((REFERENCE / name / "config.json").read_text())
    family, model = families.of_config(found)
    run = small.changed(small.RUN, model=model)
    made = nnx.state(Decoder(model, run.precision, jax.random.key(0)))
    weights = checkpoint.flat(jax.device_get(nnx.to_pure_dict(made)))
    again = {path: np.zeros_like(value) for path, value in weights.items()}
    for entry in families.entries(family, model, weights):
        theirs = entry.join(lambda piece: weights[piece.path][piece.index])
        assert theirs.shape == entry.shape
        for piece, ours in entry.split(theirs):
            again[piece.path][piece.index] = ours
    for path, value in weights.items():
        np.testing.assert_array_equal(again[path], value)


PEAK = """
import pathlib, re, sys
from scaletrain import checkpoint, main, step  # what every import needs
from scaletrain.hf import importer
from scaletrain.models import Decoder
from scaletrain.program import build

def peak():  # ru_maxrss would begin with the memory of the process that started this
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", status)[1])

before = peak()
importer.import_checkpoint(sys.argv[1], sys.argv[2], [])
print(peak() - before)
"""


def test_an_import_needs_little_more_memory_than_its_weights(tmp_path):
    """Peak <= 1.5 x the largest tensor + the weights + what JAX itself takes."""
    found = json.loads((REFERENCE / "llama" / "config.json").read_text())
    sizes = {"hidden_size": 512, "intermediate_size": 3072, "vocab_size": 128_000}
    found |= sizes | {"num_hidden_layers": 4, "head_dim": 256, "pad_token_id": None}
    family, model = families.of_config(found)
    run = small.changed(small.RUN, model=model)
    made = nnx.eval_shape(lambda: Decoder(model, run.precision, jax.random.key(0)))
    paths = checkpoint.flat(nnx.to_pure_dict(nnx.state(made)))
    tensors = {
        entry.name: (entry.shape, np.dtype(np.float32))
        for entry in families.entries(family, model, paths)
    }
    rng, folder = np.random.default_rng(0), tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(found))
    safetensors.write(
        folder, tensors, lambda n: rng.random(tensors[n][0], dtype=np.float32)
    )
    nbytes = {name: 4 * int(np.prod(shape)) for name, (shape, _) in tensors.items()}
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(tmp_path / "w")],
        capture_output=True, text=True, check=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    limit = 1.5 * max(nbytes.values()) + sum(nbytes.values())
    own = 150e6  # the backend and its compiler, whatever the model's size
    assert sum(nbytes.values()) > 6e8
    assert int(done.stdout) < limit + own


def test_a_card_tells_of_evaluations_that_are_not_finite(tmp_path):
    told = ['{"step": 3, "eval_loss": 2.5}', '{"step": 4, "eval_loss": null}', "{"]
    (tmp_path / "metrics.jsonl").write_text("\n".join(told))
    workdir = Workdir(tmp_path)
    assert exporter._evaluation(workdir, 3) == ["- step: 3", "- loss: 2.5000"]
    assert exporter._evaluation(workdir, 9) == ["- step: 4", "- loss: not finite"]
