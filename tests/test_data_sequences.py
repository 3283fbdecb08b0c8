"""Sequences: windows of the stream, against the stream cut by hand."""

import concurrent.futures
import pickle

import numpy as np
import pytest

from scaletrain import data
from scaletrain.config.schema import DataConfig, ModelConfig, RunConfig
from scaletrain.data.blocks import BLOCK
from scaletrain.data.tokenise import split_of
from scaletrain.errors import DataError

LENGTHS = (3, 1, 700, 40, 9000, 5, 2, 12_000, 64, 63, 31, 90, 4, 8, 300)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number, length in enumerate(LENGTHS):
        (folder / f"{number:02}.txt").write_text(chr(97 + number) * length)
    return data.prepare(make_run(folder), lambda line: None)


def make_run(folder=None, **settings):
    settings = {"seq_len": 50, "model": ModelConfig(vocab_size=300)} | settings
    config = DataConfig(
        source="files",
        path=f"{folder}/*.txt",
        validation_fraction=0.3,
        cache_dir=f"{folder}/cache",
    )
    return RunConfig(data=config, **settings)


def naive_stream(split):
    """Returns a split's tokens, put together document by document."""
    tokens = [256]
    for number, length in enumerate(LENGTHS):
        if split_of(f"{number:02}.txt", 0.3) == split:
            tokens += [97 + number] * length + [256]
    return tokens


def naive_example(tokens, index, seq_len):
    rows = {name: [] for name in ("tokens", "targets", "segments", "positions")}
    segment, position = 0, 0
    for place in range(index * seq_len, (index + 1) * seq_len):
        if place + 1 >= len(tokens):
            values = (0, 0, 0, 0)
        else:
            if segment == 0 or tokens[place] == 256:
                segment, position = segment + 1, 0
            values = (tokens[place], tokens[place + 1], segment, position)
            position += 1
        for row, value in zip(rows.values(), values, strict=True):
            row.append(value)
    rows["weights"] = [1.0 if segment else 0.0 for segment in rows["segments"]]
    return rows


@pytest.mark.parametrize("seq_len", [2, 7, 50, 1000, BLOCK])
@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_are_the_streams(corpus, split, seq_len):
    found = data.sequences(corpus, split, make_run(seq_len=seq_len))
    tokens = naive_stream(split)
    whole, rest = divmod(len(tokens) - 1, seq_len)
    assert len(found) == whole + (1 if split == "validation" and rest else 0)
    step = max(1, len(found) // 300)
    for index in {*range(0, len(found), step), len(found) - 1}:
        example = found[index]
        dtypes = {name: str(value.dtype) for name, value in example.items()}
        assert dtypes.pop("weights") == "float32"
        assert set(dtypes.values()) == {"int32"}
        got = {name: value.tolist() for name, value in example.items()}
        assert got == naive_example(tokens, index, seq_len)


def test_every_byte_and_every_end_is_predicted_once(corpus):
    found = data.sequences(corpus, "validation", make_run())
    split = corpus.splits["validation"]
    weights = sum(float(found[i]["weights"].sum()) for i in range(len(found)))
    assert weights == split.num_bytes + split.num_documents == split.num_tokens - 1


def test_a_window_that_starts_with_an_end_starts_segment_one(corpus):
    first = data.sequences(corpus, "train", make_run())[0]
    assert first["tokens"][0] == 256
    assert (first["segments"][0], first["positions"][0]) == (1, 0)


@pytest.mark.parametrize("index", [-1, 10**9])
def test_there_are_no_other_windows(corpus, index):
    with pytest.raises(IndexError):
        data.sequences(corpus, "train", make_run())[index]


def test_a_training_split_shorter_than_one_window_is_refused(corpus):
    split = corpus.splits["train"]
    longest = make_run(seq_len=split.num_tokens - 1)
    assert len(data.sequences(corpus, "train", longest)) == 1
    message = f"seq_len={split.num_tokens}; the training split has only .*; set seq_len"
    with pytest.raises(DataError, match=message):
        data.sequences(corpus, "train", make_run(seq_len=split.num_tokens))
    padded = data.sequences(corpus, "validation", make_run(seq_len=split.num_tokens))
    assert len(padded) == 1
    with pytest.raises(DataError, match="split='test'; there are train and validation"):
        data.sequences(corpus, "test", longest)


def test_documents_are_where_they_begin_in_the_stream(corpus):
    stream = naive_stream("train")
    found = data.sequences(corpus, "train", make_run())
    assert max(LENGTHS) > BLOCK  # some begin more than a block before an example
    begin, begins = 0, []
    for place, token in enumerate(stream):
        begin = place if token == 256 else begin
        begins.append(begin)
    for index in range(len(found)):
        wanted = sorted(set(begins[index * 50 : (index + 1) * 50]))
        assert found.documents(index) == wanted


def test_threads_and_pickles_read_the_same(corpus):
    found = data.sequences(corpus, "train", make_run())
    expected = [found[i]["tokens"] for i in range(len(found))]
    copy = pickle.loads(pickle.dumps(found))
    order = np.random.default_rng(0).permutation(len(found)).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, example in zip(order, pool.map(copy.__getitem__, order), strict=True):
            np.testing.assert_array_equal(example["tokens"], expected[i])


def test_synthetic_tokens_are_uniform_and_follow_seed_and_number():
    run = RunConfig(
        data=DataConfig(source="synthetic"), seq_len=64, seed=7, model=ModelConfig()
    )
    corpus = data.prepare(run, lambda line: None)
    train = data.sequences(corpus, "train", run)
    validation = data.sequences(corpus, "validation", run)
    assert (len(train), len(validation)) == (2**20, 64)
    assert train.split is None
    example = train[3]
    expected = np.random.default_rng((7, 3)).integers(0, 512, 65, dtype=np.int32)
    np.testing.assert_array_equal(example["tokens"], expected[:-1])
    np.testing.assert_array_equal(example["targets"], expected[1:])
    assert set(example["segments"].tolist()) == {1}
    assert example["positions"].tolist() == list(range(64))
    assert set(example["weights"].tolist()) == {1.0}
    assert {value.shape for value in example.values()} == {(64,)}
    assert example["tokens"].tolist() != validation[3]["tokens"].tolist()
    many = np.concatenate([train[i]["tokens"] for i in range(400)])
    assert set(many.tolist()) == set(range(512))
    with pytest.raises(IndexError):
        validation[64]
