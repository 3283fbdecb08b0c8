"""Tokenizers: what they promise of ids, of text, and of the end of it."""

import contextlib
import io
import json
import pathlib

import fsspec
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


def test_killed_while_it_is_saved_again_a_tokenizer_stays_whole(tmp_path, monkeypatch):
    BPE.save(tmp_path)
    opened, written = pathlib.Path.open, []

    @contextlib.contextmanager
    def killed(path, mode):
        """Yields a file of which half is written when the process is killed."""
        written.append(path)
        with opened(path, mode) as file:

            class Half:
                def write(self, content):
                    file.write(content[: len(content) // 2])
                    raise KeyboardInterrupt

            yield Half()

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "open", killed)
        with pytest.raises(KeyboardInterrupt):
            BPE.save(tmp_path)
    assert len(written) == 1
    assert load_tokenizer(tmp_path).fingerprint == BPE.fingerprint


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(DataError, match="no tokenizer can be read there"):
        load_tokenizer(tmp_path)
    BPE.save(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(DataError, match="no tokenizer can be read there"):
        load_tokenizer(tmp_path)


BOS, STOP = "<|bos|>", "<|stop|>"
CONFIG: dict = {"bos_token": BOS, "eos_token": {"content": STOP}}


def published_model(config, framed=True):
    """Returns the files of somebody else's model, whose texts begin with `BOS`."""
    from tokenizers import Tokenizer, processors

    library = Tokenizer.from_str(BPE.published()["tokenizer.json"].decode())
    library.add_special_tokens([BOS, STOP])
    if framed:
        library.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, 300)]
        )
    return {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps(config).encode(),
        "special_tokens_map.json": b'{"pad_token": "return"}',
        "generation_config.json": b'{"eos_token_id": [301, 0]}',
        "chat_template.jinja": b"{% for m in messages %}{{ m.content }}{% endfor %}",
        "chat_template.json": b'{"chat_template": "older"}',
        "added_tokens.json": b"{}",
        "tokenizer.model": b"\x00\xff",
    }


def read(folder, files, **settings) -> JsonTokenizer:
    folder.mkdir(exist_ok=True, parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = read_tokenizer(
        DataConfig(tokenizer=str(folder / "tokenizer.json"), **settings)
    )
    assert isinstance(found, JsonTokenizer)
    return found


def test_what_lies_beside_a_tokenizer_goes_with_it(tmp_path):
    files = published_model(CONFIG)
    first = read(tmp_path / "a", files | {"vocab.json": b"{}", "x.json": b"{}"})
    first.save(tmp_path / "b")
    assert {p.name for p in (tmp_path / "b").iterdir()} == {*files, "about.json"}
    again = load_tokenizer(tmp_path / "b")
    memory = fsspec.filesystem("memory")
    memory.pipe({f"/tokenizer/{name}": content for name, content in files.items()})
    remote = read_tokenizer(DataConfig(tokenizer="memory://tokenizer/tokenizer.json"))
    for tokenizer in (first, again, remote):
        assert isinstance(tokenizer, JsonTokenizer)
        assert tokenizer.published() == files
        assert tokenizer.fingerprint == first.fingerprint
        assert tokenizer.end_id == 301
        assert tokenizer.prompt("x") == [300, *BPE.encode_batch(["x"])[0]]
        ids, answers = tokenizer.chat([{"role": "assistant", "content": "x"}])
        assert ids.tolist() == BPE.encode_batch(["x"])[0].tolist()
        assert answers.all()


@pytest.mark.parametrize(
    ("config", "asked", "end_id"),
    [
        (CONFIG, "", 301),
        ({"eos_token": BOS}, "", 300),
        ({"eos_token": None}, "", 0),
        ({"eos_token": "<|nowhere|>"}, "", 0),
        (CONFIG, BOS, 300),
    ],
)
def test_the_config_names_the_end_unless_it_was_asked_for(
    tmp_path, config, asked, end_id
):
    files = published_model(config)
    tokenizer = read(tmp_path, files, end_of_text=asked)
    assert tokenizer.end_id == end_id
    tokenizer.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").end_id == end_id


def test_an_end_that_only_the_special_tokens_map_names(tmp_path):
    named = json.dumps({"eos_token": STOP}).encode()
    files = published_model({}) | {"special_tokens_map.json": named}
    assert read(tmp_path, files).end_id == 301
    newer = {"tokenizer_config.json": b'{"added_tokens_decoder": {}}'}
    assert read(tmp_path, files | newer).end_id == 0


X = BPE.encode_batch(["x"])[0].tolist()


@pytest.mark.parametrize(
    ("config", "framed", "text", "ids"),
    [
        (CONFIG, True, "x", [300, *X]),
        (CONFIG, True, "", [300]),
        (CONFIG, False, "x", X),
        (CONFIG, False, "", [301]),
        (CONFIG, False, f"x{STOP}{BOS}", [*X, 301, 300]),
        (CONFIG | {"add_bos_token": True}, False, "x", [300, *X]),
        (CONFIG | {"add_bos_token": True}, True, "x", [300, *X]),
        (CONFIG | {"add_bos_token": False}, True, "x", X),
        (CONFIG | {"add_eos_token": True}, False, "x", [*X, 301]),
        ({"add_bos_token": True, "eos_token": STOP}, False, "x", X),
    ],
)
def test_a_prompt_begins_as_the_models_files_say(tmp_path, config, framed, text, ids):
    tokenizer = read(tmp_path, published_model(config, framed))
    assert tokenizer.prompt(text) == ids


def test_a_token_that_only_the_config_calls_special_is_special(tmp_path):
    # "ext" is an ordinary piece of the vocabulary, and "endoftext" is another.
    config = CONFIG | {"pad_token": "ext", "added_tokens_decoder": {}}
    tokenizer = read(tmp_path, published_model(config))
    (whole,), (first,), (rest,) = BPE.encode_batch(["endoftext", "endoft", "ext"])
    assert tokenizer.encode_batch(["endoftext"])[0].tolist() == [whole]
    assert tokenizer.prompt("endoftext") == [300, first, rest]


def test_a_prompt_of_ones_own_begins_with_an_end(tmp_path):
    assert ByteTokenizer().prompt("aé") == [256, 97, 0xC3, 0xA9]
    assert ByteTokenizer().prompt("") == [256]
    assert BPE.prompt("x") == [0, *X]
    assert BPE.prompt(END_OF_TEXT)[0] == 0
    assert 0 not in BPE.prompt(END_OF_TEXT)[1:]
    BPE.save(tmp_path)
    assert load_tokenizer(tmp_path).prompt("x") == [0, *X]
    pieces = PieceTokenizer(piece_model())
    assert pieces.prompt("x") == [1, *pieces.encode_batch(["x"])[0]]
    without = PieceTokenizer(piece_model(bos_id=-1))
    assert without.prompt("") == [without.end_id]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"[]"),
        ("special_tokens_map.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_damaged_file_beside_a_tokenizer_is_refused(tmp_path, name, content):
    files = published_model(CONFIG) | {name: content}
    with pytest.raises(DataError, match=r"tokenizer.json'; it cannot be read: "):
        read(tmp_path, files)


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPE], ids=["bytes", "bpe"])
@settings(deadline=None)
@given(text=UNICODE | st.sampled_from(TEXTS))
def test_what_is_published_has_the_same_ids(tokenizer, text):
    from tokenizers import Tokenizer

    files = tokenizer.published()
    config = json.loads(files["tokenizer_config.json"])
    library = Tokenizer.from_str(files["tokenizer.json"].decode())
    text = text.replace(END_OF_TEXT, "")
    ids = library.encode(text).ids
    assert ids == tokenizer.encode_batch([text])[0].tolist()
    assert library.decode(ids) == text
    assert library.token_to_id(config["eos_token"]) == tokenizer.end_id
    assert library.get_vocab_size() == tokenizer.vocab_size
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_pieces_are_published_if_a_llama_would_read_them_alike():
    like = {"model_type": "bpe", "normalization_rule_name": "identity"}
    model = piece_model(**like, remove_extra_whitespaces=False)
    files = PieceTokenizer(model).published()
    assert files["tokenizer.model"] == model
    config = json.loads(files["tokenizer_config.json"])
    assert config["tokenizer_class"] == "LlamaTokenizer"
    assert (config["bos_token"], config["add_bos_token"]) == ("<s>", True)
    for other in (
        {"model_type": "unigram"},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
    ):
        options = like | {"remove_extra_whitespaces": False} | other
        with pytest.raises(DataError, match="convert it to a tokenizer.json"):
            PieceTokenizer(piece_model(**options)).published()
