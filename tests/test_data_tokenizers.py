"""Tokenizers: what they promise of ids, of text, and of the end of it."""

import io
import json

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain.config.schema import DataConfig
from scaletrain.data.tokenizers import (
    END_OF_TEXT,
    ByteTokenizer,
    JsonTokenizer,
    PieceTokenizer,
    load_tokenizer,
    read_tokenizer,
    train_bpe,
)
from scaletrain.errors import DataError

TEXTS = [
    f"def f{i}(x):\n    return x + {i}  # größer <|endoftext|>\n" for i in range(60)
]
BPE = train_bpe(TEXTS, 300)
UNICODE = st.text(st.characters(exclude_categories=["Cs"]))


def piece_model(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_writer=model,
        vocab_size=300,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def content(tmp_path):
    BPE.save(tmp_path)
    return json.loads((tmp_path / "tokenizer.json").read_text())


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@settings(deadline=None)
@given(texts=st.lists(UNICODE | st.sampled_from(TEXTS), max_size=4))
def test_any_text_comes_back(tokenizer, texts):
    encoded = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(ids) for ids in encoded] == texts
    for ids in encoded:
        assert ids.dtype == np.int32
        assert tokenizer.end_id not in ids
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_bytes():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode_batch(["aé"])[0].tolist() == [97, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.end_id) == (257, 256)
    assert tokenizer.decode([0xC3, 97, 256, 300]) == "\ufffda"


def test_bpe_has_exactly_the_ids_asked_for_and_always_the_same():
    again = train_bpe(TEXTS, 300)
    assert (BPE.vocab_size, BPE.end_id) == (300, 0)
    assert again.fingerprint == BPE.fingerprint
    assert train_bpe(TEXTS, 299).fingerprint != BPE.fingerprint
    assert len(BPE.encode_batch([TEXTS[0]])[0]) < len(TEXTS[0]) / 2
    assert BPE.decode([0, 99_999]) == END_OF_TEXT


@pytest.mark.parametrize("end", ["special", "ordinary", "unlisted"])
def test_the_end_tokens_spelling_is_text(tmp_path, end):
    stored = content(tmp_path)
    stored["added_tokens"][0]["special"] = end == "special"
    if end == "unlisted":
        stored["added_tokens"] = []
    tokenizer = JsonTokenizer(json.dumps(stored))
    text = f"a{END_OF_TEXT}b {END_OF_TEXT}"
    ids = tokenizer.encode_batch([text])[0]
    assert tokenizer.end_id == 0
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_a_files_own_truncation_padding_and_framing_are_left_out(tmp_path):
    from tokenizers import Tokenizer, processors

    BPE.save(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(3)
    library.enable_padding(length=9)
    library.post_processor = processors.TemplateProcessing(
        single=f"{END_OF_TEXT} $A", special_tokens=[(END_OF_TEXT, 0)]
    )
    tokenizer = JsonTokenizer(library.to_str())
    expected = BPE.encode_batch([TEXTS[0], "x"])
    for got, ids in zip(tokenizer.encode_batch([TEXTS[0], "x"]), expected, strict=True):
        assert got.tolist() == ids.tolist()


@pytest.mark.parametrize("spelling", ["<|end_of_text|>", "</s>", "<eos>", "<|im_end|>"])
def test_the_end_token_is_found_or_asked_for(tmp_path, spelling):
    text = json.dumps(content(tmp_path)).replace(END_OF_TEXT, spelling)
    path = tmp_path / "other.json"
    path.write_text(text)
    found = read_tokenizer(DataConfig(tokenizer=str(path)))
    assert found is not None
    assert found.end_id == 0
    assert spelling in found.decode([0])
    named = read_tokenizer(DataConfig(tokenizer=str(path), end_of_text="ret"))
    assert named is not None
    assert named.end_id != 0
    assert named.fingerprint != found.fingerprint
    with pytest.raises(DataError, match=r"'retur.'; the tokenizer has.*return"):
        read_tokenizer(DataConfig(tokenizer=str(path), end_of_text="retur."))
    path.write_text(text.replace(spelling, "<stop>"))
    with pytest.raises(DataError, match=r"none of .*</s>.*; set data.end_of_text to"):
        read_tokenizer(DataConfig(tokenizer=str(path)))


def test_sentence_pieces(tmp_path):
    path = tmp_path / "a.model"
    path.write_bytes(piece_model())
    tokenizer = read_tokenizer(DataConfig(tokenizer=str(path)))
    assert isinstance(tokenizer, PieceTokenizer)
    assert tokenizer.end_id == 2
    ids = tokenizer.encode_batch(["x </s> größer", "return"])[0]
    assert 2 not in ids
    assert tokenizer.decode([*ids, 99_999]) == "x </s> größer"
    with pytest.raises(DataError, match=r"data.end_of_text='<stop>'"):
        read_tokenizer(DataConfig(tokenizer=str(path), end_of_text="<stop>"))
    path.write_bytes(piece_model(eos_id=-1, control_symbols=["<|im_end|>"]))
    other = read_tokenizer(DataConfig(tokenizer=str(path)))
    assert other is not None
    assert "<|im_end|>" not in other.decode(other.encode_batch(["x"])[0])
    assert 0 < other.end_id < other.vocab_size
    assert other.end_id not in other.encode_batch(["<|im_end|>"])[0]


@pytest.mark.parametrize(
    "tokenizer",
    [ByteTokenizer(), BPE, PieceTokenizer(piece_model(), "</s>")],
    ids=["bytes", "bpe", "pieces"],
)
def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new" / "tokenizer")
    loaded = load_tokenizer(tmp_path / "new" / "tokenizer")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.vocab_size, loaded.end_id) == (
        tokenizer.vocab_size,
        tokenizer.end_id,
    )
    expected = tokenizer.encode_batch(TEXTS[:2])
    for got, ids in zip(loaded.encode_batch(TEXTS[:2]), expected, strict=True):
        assert got.tolist() == ids.tolist()


@pytest.mark.parametrize(
    ("name", "stored"),
    [("none.json", None), ("a.json", b"{"), ("b.json", b"\xff"), ("c.model", b"junk")],
)
def test_an_unreadable_tokenizer_is_refused(tmp_path, name, stored):
    path = tmp_path / name
    if stored is not None:
        path.write_bytes(stored)
    with pytest.raises(DataError, match=f"data.tokenizer='{path}'.*; give bytes, bpe"):
        read_tokenizer(DataConfig(tokenizer=str(path)))


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer can be read there"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer can be read there"):
        load_tokenizer(tmp_path)
