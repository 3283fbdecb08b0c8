"""From a published model with a chat template to a tuned one, on the command line."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from scaletrain.config import ModelConfig
from scaletrain.hf import families, safetensors

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokenizer():
    """Bytes, and the marks of a chat."""
    vocabulary = {
        s: i for i, s in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    made.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return made


@pytest.fixture
def published(tmp_path):
    """A folder as one is downloaded: random weights, a tokenizer and its template."""
    folder = tmp_path / "published"
    folder.mkdir()
    model = ModelConfig(
        num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_head=8, d_ff=64,
        vocab_size=272, max_positions=128,
    )  # fmt: skip
    family, settings = families.of_model("llama", model)
    shapes = {
        "embedding", "norm/scale", "head/weight", "blocks/attention_norm/scale",
        "blocks/mlp_norm/scale",
        *(f"blocks/attention/{name}/weight" for name in "qkvo"),
        *(f"blocks/mlp/{name}/weight" for name in ("gate", "up", "down")),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    tensors = {
        entry.name: (entry.shape, np.dtype(np.float32))
        for entry in families.entries(family, model, shapes)
    }
    safetensors.write(
        folder,
        tensors,
        lambda name: rng.normal(0, 0.2, tensors[name][0]).astype(np.float32),
    )
    end = {"eos_token_id": 258, "bos_token_id": 256}
    (folder / "config.json").write_text(json.dumps(settings | end))
    (folder / "generation_config.json").write_text(json.dumps(end | {"top_k": 20}))
    tokenizer().save(str(folder / "tokenizer.json"))
    about = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def scaletrain(*args):
    done = subprocess.run(
        [sys.executable, "-m", "scaletrain.main", *map(str, args)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_published_model_is_tuned_on_chats_and_goes_out_again(published, tmp_path):
    chats = tmp_path / "chats.jsonl"
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"say {i % 3}"},
                {"role": "assistant", "content": "yes " * (1 + i % 3)},
            ]
        }
        for i in range(64)
    ]
    chats.write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, tuned, out = tmp_path / "base", tmp_path / "tuned", tmp_path / "out"
    scaletrain("import", f"--from={published}", f"--workdir={base}")
    scaletrain(
        "train", f"--config={base}/config.json", f"--workdir={tuned}",
        f"--config.init_from={base}",
        "--config.data.source=files", f"--config.data.path={chats}",
        "--config.data.format=chat", f"--config.data.cache_dir={tmp_path}/cache",
        "--config.data.validation_fraction=0.2", "--config.optim.learning_rate=3e-2",
        "--config.num_steps=100", "--config.seq_len=64",
        "--config.optim.warmup_steps=0",
        "--config.log_every_steps=1",
    )  # fmt: skip
    lines = (tuned / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines]
    assert losses[99] < losses[0] / 2
    prompt = "<|im_start|>user\nsay 1<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer().encode(prompt).ids
    answer = scaletrain(
        "generate", f"--workdir={tuned}", f"--prompt_ids={','.join(map(str, ids))}",
        "--temperature=0", "--max_new_tokens=16", "--json",
    )  # fmt: skip
    assert json.loads(answer)[0]["text"].startswith("yes ")
    scaletrain("export", f"--workdir={tuned}", f"--to={out}")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        then, now = (json.loads((f / name).read_text()) for f in (published, out))
        assert then == now
    config = json.loads((out / "config.json").read_text())
    assert (config["eos_token_id"], config["bos_token_id"]) == (258, 256)
    assert json.loads((out / "generation_config.json").read_text())["top_k"] == 20
    card = pathlib.Path(out / "README.md").read_text()
    assert str(chats) in card
    assert "- loss: " in card
