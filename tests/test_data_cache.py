"""The cache: whole or absent, and never that of another corpus."""

import errno
import hashlib
import itertools
import json
import math
import os
import pathlib
import pwd
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from typing import Any

import numpy as np
import pytest

from scaletrain import data
from scaletrain.config.schema import DataConfig, ModelConfig, RunConfig
from scaletrain.data import cache, tokenise
from scaletrain.data.blocks import BLOCK, Stream, StreamWriter
from scaletrain.data.counts import ByteCounts
from scaletrain.data.tokenizers import END_OF_TEXT, ByteTokenizer, JsonTokenizer
from scaletrain.errors import DataError


def texts():
    rng = np.random.default_rng(0)
    words = [
        "für",
        "if",
        "else:\n",
        "    return",
        "x",
        "y()",
        "\r\n",
        END_OF_TEXT,
        "\U0001d6fc",
    ]
    return [" ".join(rng.choice(words, size=rng.integers(1, 400))) for _ in range(40)]


@pytest.fixture
def run(tmp_path):
    """Returns a run on forty documents, its settings exchanged as asked."""
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(texts()):
        (tmp_path / "corpus" / f"{number:02}.txt").write_bytes(text.encode())

    def make(vocab_size=300, **settings):
        defaults = {
            "source": "files",
            "path": str(tmp_path / "corpus" / "*.txt"),
            "validation_fraction": 0.3,
            "cache_dir": str(tmp_path / "cache"),
        }
        model = ModelConfig(vocab_size=vocab_size)
        return RunConfig(model=model, data=DataConfig(**(defaults | settings)))

    return make


def quiet(line):
    del line


def unexpected(line):
    raise AssertionError(line)


def prepared(run, say=quiet) -> Any:
    """Returns the corpus of a run on text, which therefore has a tokenizer."""
    return data.prepare(run, say)


def stream(split):
    return Stream(split.path, split.num_tokens, split.dtype).window(0, split.num_tokens)


def expected_documents(fraction=0.3):
    """Returns the texts of each split, by the rule as it is written down."""
    found = {"train": [], "validation": []}
    for number, text in enumerate(texts()):
        digest = hashlib.sha256(f"{number:02}.txt".encode()).hexdigest()
        place = int(digest[:16], 16) / 2**64
        found["validation" if place < fraction else "train"].append(text)
    return found


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_split_is_its_documents_each_behind_an_end_of_text(run, tokenizer):
    corpus = prepared(run(tokenizer=tokenizer))
    for name, documents in expected_documents().items():
        split, expected = corpus.splits[name], []
        for ids in corpus.tokenizer.encode_batch(documents):
            expected += [corpus.tokenizer.end_id, *ids.tolist()]
        expected.append(corpus.tokenizer.end_id)
        assert stream(split).tolist() == expected
        assert split.num_tokens == len(expected)
        assert split.num_documents == len(documents)
        assert split.num_bytes == sum(len(text.encode()) for text in documents)
    assert corpus.splits["train"].num_tokens > BLOCK or tokenizer == "bpe"
    assert corpus.splits["train"].dtype == "uint16"


def test_a_trained_tokenizer_has_seen_training_documents_only(run, monkeypatch):
    seen = []
    train = tokenise.train_bpe

    def watched(documents, vocab_size):
        seen.extend(documents)
        return train(seen, vocab_size)

    monkeypatch.setattr(tokenise, "train_bpe", watched)
    monkeypatch.setattr(tokenise, "_BPE_CHARACTERS", 20_000)
    corpus = prepared(run(tokenizer="bpe"))
    assert corpus.tokenizer.vocab_size == 300
    expected = expected_documents()
    assert "".join(seen) == "".join(expected["train"])[:20_000]
    assert expected["validation"][0] in "".join(texts())[:20_000]


def test_chunks_change_nothing(run, monkeypatch, tmp_path):
    whole = data.prepare(run(), quiet)
    monkeypatch.setattr(tokenise, "_CHUNK", 100)
    pieces = data.prepare(run(cache_dir=str(tmp_path / "other")), quiet)
    assert pieces.fingerprint == whole.fingerprint
    split = "validation"
    assert data.baselines(pieces, pieces.splits[split]) == data.baselines(
        whole, whole.splits[split]
    )


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_corpus_is_tokenised_once(run, tokenizer, monkeypatch):
    lines = []
    first = prepared(run(tokenizer=tokenizer), lines.append)
    assert "tokenised 0.1 MB" in lines[-1] or "tokenised 0.0 MB" in lines[-1]
    monkeypatch.setattr(cache, "tokenise", None)
    again = prepared(run(tokenizer=tokenizer), unexpected)
    assert (again.fingerprint, again.splits) == (first.fingerprint, first.splits)
    assert again.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_the_fingerprint_follows_content_and_settings(run, tmp_path):
    def fingerprint(**settings):
        return data.prepare(run(**settings), quiet).fingerprint

    first = fingerprint()
    others = [
        fingerprint(tokenizer="bpe"),
        fingerprint(tokenizer="bpe", vocab_size=299),
        fingerprint(validation_fraction=0.2),
        fingerprint(path=str(tmp_path / "corpus" / "[12]*.txt")),
    ]
    assert len({first, *others}) == 5
    assert fingerprint(vocab_size=400) == first
    assert fingerprint(cache_dir=str(tmp_path / "other")) == first
    one = tmp_path / "corpus" / "07.txt"
    before = one.read_bytes()
    one.write_bytes(before[:-1] + b"?")
    os.utime(one, (1, 1))
    assert fingerprint() != first
    one.write_bytes(before)
    os.utime(one, (2, 2))
    assert fingerprint() == first  # the same text at another time is the same corpus


def test_the_fingerprint_follows_the_tokenizer_beyond_the_ids_in_use(run, tmp_path):
    one = prepared(run(tokenizer="bpe"))
    one.tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"].append(
        content["added_tokens"][0] | {"content": "u", "id": 301}
    )
    path.write_text(json.dumps(content))
    other = prepared(run(tokenizer=str(path), vocab_size=400))
    assert (
        stream(other.splits["train"]).tolist() == stream(one.splits["train"]).tolist()
    )
    assert other.fingerprint != one.fingerprint
    prepared(run(vocab_size=400))
    prepared(run(tokenizer=str(path), vocab_size=400), unexpected)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("length", [1, BLOCK - 1, BLOCK, 2 * BLOCK, 3 * BLOCK + 5])
def test_any_window_of_a_stream_is_what_was_written(tmp_path, length, dtype):
    rng = np.random.default_rng(length)
    tokens = rng.integers(0, np.iinfo(dtype).max // 2, length)
    writer = StreamWriter(tmp_path / "stream", dtype)
    for part in np.array_split(tokens, 7):
        writer.add(part)
    writer.close()
    found = Stream(tmp_path / "stream", length, dtype)
    edges = [0, *rng.integers(0, length, 20).tolist(), BLOCK - 1, BLOCK, BLOCK + 1]
    for start, stop in itertools.product(edges, [*edges, length]):
        if start < stop <= length:
            window = found.window(start, stop)
            assert window.dtype == np.int32
            np.testing.assert_array_equal(window, tokens[start:stop])
    with pytest.raises(DataError, match="blocks for"):
        Stream(tmp_path / "stream", length + BLOCK, dtype)


def test_the_default_cache_is_the_users(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    corpus = data.prepare(run(cache_dir=""), quiet)
    assert corpus.splits["train"].path.parents[1] == tmp_path / "xdg" / "scaletrain"


def test_a_user_without_a_home_is_asked_for_a_cache(run, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(DataError, match="data.cache_dir=''; .*no home folder.*; set"):
        data.prepare(run(cache_dir=""), quiet)
    data.prepare(run(), quiet)


def test_a_tokenizer_larger_than_the_model_is_refused(run, tmp_path):
    message = "model.vocab_size=256; the tokenizer has 257 ids; set .* at least 257"
    with pytest.raises(DataError, match=message):
        data.prepare(run(vocab_size=256), quiet)
    prepared(run(tokenizer="bpe")).tokenizer.save(tmp_path)
    file = str(tmp_path / "tokenizer.json")
    with pytest.raises(DataError, match="299; the tokenizer has 300 ids"):
        data.prepare(run(vocab_size=299, tokenizer=file), quiet)
    data.prepare(run(tokenizer=file), quiet)
    with pytest.raises(DataError, match="299; the tokenizer has 300 ids"):
        data.prepare(run(vocab_size=299, tokenizer=file), quiet)


def test_a_checkpoint_may_know_tokens_that_no_document_has(run, tmp_path):
    """Published tokenizers often have one more than their model has rows."""
    exact = prepared(run(tokenizer="bpe"))
    exact.tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    image = {**content["added_tokens"][0], "id": 300, "content": "<image>"}
    content["added_tokens"].append(image)
    larger = JsonTokenizer(json.dumps(content))
    assert larger.vocab_size == 301
    kept = data.prepare(run(tokenizer="x"), quiet, larger)
    for name, split in kept.splits.items():
        np.testing.assert_array_equal(stream(split), stream(exact.splits[name]))
    largest = max(int(stream(split).max()) for split in kept.splits.values())
    token = re.escape(repr(larger.decode([largest])))
    message = rf"\.txt; its token {largest} \({token}\) has no row .*={largest}; leave"
    with pytest.raises(DataError, match=message):
        data.prepare(run(tokenizer="x", vocab_size=largest), quiet, larger)


def test_too_little_text_for_the_table_is_told(run):
    lines = []
    corpus = prepared(run(tokenizer="bpe", vocab_size=9000), lines.append)
    assert corpus.tokenizer.vocab_size < 9000
    assert any(line.startswith("model.vocab_size=9000; ") for line in lines)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"path": "{}/corpus/00.txt"},
            "none of the 1 documents .* validation split; rai",
        ),
        (
            {"validation_fraction": 0.001},
            "=0.001; none of the 40 documents .*set it to 0",
        ),
        ({"path": "{}/empty.txt"}, "empty.txt'; it has no text at all"),
        ({"cache_dir": "{}/empty.txt/x"}, "data.cache_dir=.*; no folder can be made"),
    ],
)
def test_what_cannot_be_split_or_kept_is_refused(run, tmp_path, settings, message):
    (tmp_path / "empty.txt").write_text("")
    settings = {
        key: value.format(tmp_path) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(DataError, match=message):
        data.prepare(run(**settings), quiet)


def test_no_document_may_fall_to_training(run, tmp_path):
    path = str(tmp_path / "corpus" / "10.txt")
    fraction = int(hashlib.sha256(b"10.txt").hexdigest()[:16], 16) / 2**64 + 1e-9
    with pytest.raises(DataError, match="falls to the train split; lower it"):
        data.prepare(run(path=path, validation_fraction=fraction), quiet)


def test_validation_may_be_left_out(run, tmp_path):
    path = str(tmp_path / "corpus" / "00.txt")
    corpus = data.prepare(run(path=path, validation_fraction=0.0), quiet)
    validation = corpus.splits["validation"]
    assert validation.num_tokens == 0
    assert data.baselines(corpus, validation) == {}
    assert len(data.sequences(corpus, "validation", run())) == 0


def test_an_end_of_text_made_of_text_is_refused(run, monkeypatch):
    monkeypatch.setattr(ByteTokenizer, "end_id", ord("x"))
    with pytest.raises(DataError, match=r"\.txt; the tokenizer makes its end of text"):
        data.prepare(run(), quiet)


def test_a_full_disk_is_told_of(run, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ByteCounts, "save", full)
    with pytest.raises(DataError, match="cache_dir=.*; No space left on device for"):
        data.prepare(run(), quiet)


def test_a_disk_that_refuses_a_block_is_told_of(run, tmp_path, monkeypatch):
    """The library of the blocks has an error of its own for a full disk."""

    def fill():
        writer = StreamWriter(pathlib.Path("/dev/full"), "uint16")
        writer.add(np.zeros(BLOCK))
        writer.close()

    with pytest.raises(OSError, match="No space left on device"):
        fill()

    def refused(*args):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(StreamWriter, "add", refused)
    with pytest.raises(DataError, match="cache_dir=.*; Permission denied for"):
        data.prepare(run(), quiet)


def test_a_build_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    encode, calls = ByteTokenizer.encode_batch, []

    def failing(self, chunk):
        calls.append(chunk)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, chunk)

    monkeypatch.setattr(tokenise, "_CHUNK", 5000)
    with monkeypatch.context() as patched:
        patched.setattr(ByteTokenizer, "encode_batch", failing)
        with pytest.raises(KeyboardInterrupt):
            data.prepare(run(), quiet)
    assert list((tmp_path / "cache").iterdir()) == []
    data.prepare(run(), quiet)


BUILD = """
import sys, time
from scaletrain import data
from scaletrain.config.schema import DataConfig, ModelConfig, RunConfig
from scaletrain.data import tokenise
from scaletrain.data.tokenizers import ByteTokenizer
path, folder, wait = sys.argv[1:]
encode = ByteTokenizer.encode_batch
def slow(self, texts):
    print("encoding", flush=True)
    time.sleep(float(wait))
    return encode(self, texts)
ByteTokenizer.encode_batch = slow
tokenise._CHUNK = 20_000
settings = dict(source="files", path=path, validation_fraction=0.3, cache_dir=folder)
run = RunConfig(model=ModelConfig(vocab_size=300), data=DataConfig(**settings))
print(data.prepare(run, lambda line: None).fingerprint)
assert "tensorflow" not in sys.modules
assert "tensorflow_datasets" not in sys.modules
"""


def builder(settings, wait) -> Any:
    command = [sys.executable, "-c", BUILD, settings.path, settings.cache_dir, wait]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_build_is_not_used_and_later_removed(run, tmp_path):
    with builder(run().data, wait="600") as process:
        assert process.stdout.readline() == "encoding\n"
        process.send_signal(signal.SIGKILL)
    (left,) = (tmp_path / "cache").iterdir()
    corpus = data.prepare(run(), quiet)
    assert stream(corpus.splits["train"])[-1] == 256
    assert left.exists()  # it might belong to someone who is still at work
    yesterday = time.time() - 25 * 3600
    for path in [left, *left.iterdir()]:
        os.utime(path, (yesterday, yesterday))
    os.utime(next(left.iterdir()))
    data.prepare(run(), unexpected)
    assert left.exists()
    for path in left.iterdir():
        os.utime(path, (yesterday, yesterday))
    data.prepare(run(), unexpected)
    assert not left.exists()


def test_two_builders_at_once_agree(run, tmp_path):
    with builder(run().data, "0.1") as one, builder(run().data, "0.1") as other:
        fingerprints = [p.stdout.read().splitlines()[-1] for p in (one, other)]
    assert (one.returncode, other.returncode) == (0, 0)
    corpus = data.prepare(run(), unexpected)
    assert fingerprints == [corpus.fingerprint] * 2
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_slower_of_two_builders_discards_its_own(run, tmp_path, monkeypatch):
    inner = cache.tokenise
    settings = run()

    def overtaken(*arguments):
        monkeypatch.setattr(cache, "tokenise", inner)
        data.prepare(settings, quiet)
        (winner,) = (p for p in (tmp_path / "cache").iterdir() if p.name[0] != ".")
        winner.joinpath("mark").touch()
        return inner(*arguments)

    monkeypatch.setattr(cache, "tokenise", overtaken)
    data.prepare(settings, quiet)
    (folder,) = (tmp_path / "cache").iterdir()
    assert (folder / "mark").exists()


DAMAGED = ["index.json", "train.array_record", "validation.npz", "tokenizer/about.json"]


@pytest.mark.parametrize("name", [*DAMAGED, "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_cache_is_made_anew(run, name, how):
    settings = run(tokenizer="bpe")
    corpus = data.prepare(settings, quiet)
    folder = corpus.splits["train"].path.parent
    path = folder / name
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    else:
        path.write_bytes(content[: len(content) // 2])
    lines = []
    again = data.prepare(settings, lines.append)
    assert any("tokenised" in line for line in lines)
    assert again.fingerprint == corpus.fingerprint
    assert path.exists()
    assert list(folder.parent.iterdir()) == [folder]
    data.prepare(settings, unexpected)


def test_changed_numbers_in_the_index_are_seen(run):
    corpus = data.prepare(run(), quiet)
    path = corpus.splits["train"].path.parent / "index.json"
    sealed = json.loads(path.read_text())
    sealed["index"]["splits"]["train"]["num_bytes"] += 1
    path.write_text(json.dumps(sealed))
    lines = []
    assert data.prepare(run(), lines.append).splits == corpus.splits
    assert "index.json is damaged" in lines[0]


def test_a_flipped_bit_is_an_error_and_not_a_token(run):
    corpus = data.prepare(run(), quiet)
    split = corpus.splits["train"]
    content = bytearray(split.path.read_bytes())
    assert split.num_tokens > BLOCK  # the flip lands in the first block
    content[len(content) // 4] ^= 4
    split.path.write_bytes(content)
    opened = Stream(split.path, split.num_tokens, split.dtype)
    with pytest.raises(DataError, match=r"the cache is damaged: .*; delete"):
        opened.window(0, split.num_tokens)
    counts = split.path.with_suffix(".npz")
    content = bytearray(counts.read_bytes())
    content[len(content) // 2] ^= 4
    counts.write_bytes(content)
    with pytest.raises(DataError, match=r"train\.npz; damaged: .*; delete"):
        data.baselines(corpus, corpus.splits["validation"])


@pytest.mark.parametrize("name", ["validation", "train"])
def test_baselines_are_those_of_counting_by_hand(run, name):
    corpus = data.prepare(run(), quiet)
    found = data.baselines(corpus, corpus.splits[name])
    documents = {
        split: [text.encode() for text in texts]
        for split, texts in expected_documents().items()
    }
    train, counted = documents["train"], documents[name]
    single = Counter(b for document in train for b in document)
    pairs = Counter(p for document in train for p in itertools.pairwise(document))
    before = Counter(a for document in train for a in document[:-1])
    total = sum(single.values())

    def bits0(byte):
        return -math.log2((single[byte] + 1) / (total + 256))

    def bits1(a, b):
        return -math.log2((pairs[a, b] + 1) / (before[a] + 256))

    num_bytes = sum(map(len, counted))
    order0 = math.fsum(bits0(b) for document in counted for b in document)
    order1 = math.fsum(
        bits0(d[0]) + math.fsum(bits1(a, b) for a, b in itertools.pairwise(d))
        for d in counted
    )
    assert found["order0"] == pytest.approx(order0 / num_bytes, rel=1e-12)
    assert found["order1"] == pytest.approx(order1 / num_bytes, rel=1e-12)
    assert found["order1"] < found["order0"] < 8


def test_synthetic_has_no_files():
    run = RunConfig(data=DataConfig(source="synthetic"))
    corpus = data.prepare(run, unexpected)
    assert (corpus.tokenizer, corpus.splits) == (None, {})
    other = RunConfig(data=run.data, model=ModelConfig(vocab_size=99))
    assert data.prepare(other, unexpected).fingerprint != corpus.fingerprint
