"""Tokenizers: text to ids and back, and the files that let a run carry its own.

The spelling of the end-of-text token inside a text is text: it never becomes the id
that separates documents.
"""

import difflib
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from scaletrain.config.schema import DataConfig
from scaletrain.data import sidecars
from scaletrain.data.chats import ChatTemplate, Message
from scaletrain.errors import DataError
from scaletrain.files import atomic_write

END_OF_TEXT = "<|endoftext|>"
# Spellings of the end of a text in published tokenizers, the likeliest first.
_END_SPELLINGS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int  # one more than the largest id, the end of text among them
    end_id: int  # the id that stands between documents
    fingerprint: str  # of everything that decides an id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text; `end_id` is none of them."""
        ...

    def prompt(self, text: str) -> list[int]:
        """Returns the ids that a continuation of `text` starts from, never none."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; those without a meaning are left out."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes what `load_tokenizer` needs into `folder`."""
        ...

    def published(self) -> dict[str, bytes]:
        """Returns the files from which `transformers` loads the same ids."""
        ...

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the id of each token, the token spelled as its file spells it."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and the end of text as number 256."""

    vocab_size = 257
    end_id = 256
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the bytes of each text."""
        encoded = (text.encode("utf-8") for text in texts)
        return [np.frombuffer(b, np.uint8).astype(np.int32) for b in encoded]

    def prompt(self, text: str) -> list[int]:
        """Returns the bytes of `text` behind an end of text."""
        return [self.end_id, *text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, U+FFFD in place of bytes that are not UTF-8."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: pathlib.Path) -> None:
        """Writes that this is the byte tokenizer."""
        _write(folder, {}, "bytes", "")

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of the bytes, spelled as SentencePiece spells bytes."""
        return {f"<0x{i:02X}>": i for i in range(256)} | {END_OF_TEXT: self.end_id}

    def published(self) -> dict[str, bytes]:
        """Returns a byte-level BPE that merges nothing."""
        from tokenizers import AddedToken, decoders, models, pre_tokenizers
        from tokenizers import Tokenizer as Library

        # The library writes a byte as a letter: its own, or for those without one
        # the next letter that is no byte.
        letters = sorted(pre_tokenizers.ByteLevel.alphabet())
        taken = {ord(letter) for letter in letters}
        others = (byte for byte in range(256) if byte not in taken)
        ids = {c: ord(c) if ord(c) < 256 else next(others) for c in letters}
        library = Library(models.BPE(vocab=ids, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        assert library.token_to_id(END_OF_TEXT) == self.end_id
        return {
            "tokenizer.json": library.to_str().encode("utf-8"),
            sidecars.CONFIG: _config("PreTrainedTokenizerFast", END_OF_TEXT),
        }


class JsonTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    def __init__(
        self,
        content: str,
        end_of_text: str = "",
        files: sidecars.Sidecars | None = None,
    ):
        """Reads `content`.

        Args:
          content: of tokenizer.json.
          end_of_text: that token; "" = the one `files` name, or a usual spelling.
          files: what lies beside tokenizer.json.

        Raises:
          ValueError: not a tokenizer.
          DataError: no such end-of-text token.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_str(content)
        except Exception as err:  # the library raises nothing narrower
            raise ValueError(f"it is not a tokenizer.json: {err}") from err
        self._files = dict(files or {})
        self._special_tokens = sidecars.special_tokens(self._files)
        self._template = sidecars.chat_template(self._files)
        vocabulary = library.get_vocab()
        named = self._special_tokens.get("eos_token", "")
        self._end_of_text = _end_token(vocabulary, end_of_text, named)
        # Only special tokens can be kept out of texts, and some files do not say so.
        end = AddedToken(self._end_of_text, special=True, normalized=False)
        library.add_special_tokens([end])
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        self._library, self._content = library, content
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = vocabulary[self._end_of_text]
        decisive = content
        if self._template is not None:  # of the ids of conversations
            decisive += json.dumps([self._template, self._special_tokens])
        self.fingerprint = _digest(decisive.encode("utf-8"), self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, nothing added before or after it."""
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]

    def prompt(self, text: str) -> list[int]:
        """Returns what `transformers` makes of `text` if the file came with its config.

        A tokenizer that was trained here puts an end of text before every document,
        and so before `text`; somebody else's says itself how a text begins.
        """
        if sidecars.CONFIG not in self._files:
            return [self.end_id, *self.encode_batch([text])[0].tolist()]
        # These two stand above the framing in tokenizer.json.
        told = {"add_bos_token", "add_eos_token"} & set(sidecars.config(self._files))
        ids = self._open_library.encode(text, add_special_tokens=not told).ids
        ids = [*self._asked("bos"), *ids, *self._asked("eos")]
        return ids or [self.end_id]

    def _asked(self, name: str) -> list[int]:
        """Returns the token that tokenizer_config.json puts around every text."""
        asked = sidecars.config(self._files).get(f"add_{name}_token")
        token = self._special_tokens.get(f"{name}_token", "")
        found = self._open_library.token_to_id(token) if asked else None
        return [] if found is None else [found]

    def chat(self, messages: Sequence[Message]) -> tuple[np.ndarray, np.ndarray]:
        """Returns the int32 ids of a conversation, and which of them answer.

        A token answers if its first character is one that an assistant's message adds.

        Raises:
          DataError: no chat template, or one that does not write these messages.
        """
        text, spans = self._chat_template.answers(messages)
        found = self._chat_library.encode(text, add_special_tokens=False)
        answered = np.zeros(len(text) + 1, bool)
        for start, stop in spans:
            answered[start:stop] = True
        firsts = np.array([start for start, _ in found.offsets], np.int64)
        return np.array(found.ids, np.int32), answered[firsts]

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            raise DataError(
                "the tokenizer has no chat template; put the model's "
                "tokenizer_config.json or chat_template.jinja beside its "
                "tokenizer.json, or set data.format=text."
            )
        return ChatTemplate(self._template, self._special_tokens)

    @functools.cached_property
    def _open_library(self) -> Any:
        """The library's tokenizer to whom a special token's spelling is that token."""
        return self._recognising(self._content)

    @functools.cached_property
    def _chat_library(self) -> Any:
        # Without the framing, which the template writes; some framings also move
        # the offsets of tokens that begin with a space.
        content = json.loads(self._content) | {"post_processor": None}
        return self._recognising(json.dumps(content))

    def _recognising(self, content: str) -> Any:
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        library = Library.from_str(content)
        library.no_truncation()
        library.no_padding()
        listed = {t.content for t in library.get_added_tokens_decoder().values()}
        known = set(library.get_vocab())
        unlisted = known.intersection(self._special_tokens.values()) - listed
        tokens = [AddedToken(t, normalized=False) for t in sorted(unlisted)]
        library.add_special_tokens(tokens)
        return library

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, special tokens spelled out."""
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=False)

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json, what lay beside it, and its end-of-text token."""
        _write(folder, self._everything(), "json", self._end_of_text)

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of the tokens, special ones among them."""
        return self._library.get_vocab()

    def published(self) -> dict[str, bytes]:
        """Returns the files it was read from, with a config if there was none."""
        config = _config("PreTrainedTokenizerFast", self._end_of_text)
        return {sidecars.CONFIG: config} | self._everything()

    def _everything(self) -> dict[str, bytes]:
        return self._files | {"tokenizer.json": self._content.encode("utf-8")}


class PieceTokenizer:
    """A SentencePiece model."""

    def __init__(self, content: bytes, end_of_text: str = ""):
        """Reads `content`; an empty `end_of_text` stands for the model's own.

        Raises:
          ValueError: not a model.
          DataError: no such end-of-text piece.
        """
        import sentencepiece

        library = sentencepiece.SentencePieceProcessor()
        try:
            library.LoadFromSerializedProto(content)
        except RuntimeError as err:
            raise ValueError(f"it is not a SentencePiece model: {err}") from err
        self._library = library
        self.vocab_size = library.vocab_size()
        self.end_id = library.eos_id()
        if end_of_text or self.end_id < 0:
            pieces = self.vocabulary()
            self.end_id = pieces[_end_token(pieces, end_of_text)]
        self._content = content
        self._end_of_text = end_of_text
        self.fingerprint = _digest(content, self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [np.array(ids, np.int32) for ids in self._library.encode(list(texts))]

    def prompt(self, text: str) -> list[int]:
        """Returns the ids of `text` behind the model's first token, or an end."""
        first = self._library.bos_id()
        ids = self._library.encode(text)
        return [first if first >= 0 else self.end_id, *ids]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text as the model normalised it."""
        return self._library.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.model and its end-of-text piece."""
        _write(folder, {"tokenizer.model": self._content}, "model", self._end_of_text)

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of the pieces."""
        return {self._library.id_to_piece(i): i for i in range(self.vocab_size)}

    def published(self) -> dict[str, bytes]:
        """Returns the model, to be read as a Llama's.

        Raises:
          DataError: it is not like a Llama's, so that the ids would be others.
        """
        from sentencepiece import sentencepiece_model_pb2

        protos: Any = sentencepiece_model_pb2
        model = protos.ModelProto.FromString(self._content)
        normaliser, kind = model.normalizer_spec, model.trainer_spec.model_type
        if (
            kind != model.trainer_spec.BPE
            or normaliser.name != "identity"
            or normaliser.remove_extra_whitespaces
            or not normaliser.add_dummy_prefix
        ):
            raise DataError(
                "data.tokenizer; transformers reads a SentencePiece model as BPE of "
                "the text as it is, and this one is unigram or normalises; convert it "
                "to a tokenizer.json and train with that."
            )
        spell, first = self._library.id_to_piece, self._library.bos_id()
        named = {
            "unk_token": spell(self._library.unk_id()),
            "add_bos_token": first >= 0,
        }
        if first >= 0:
            named["bos_token"] = spell(first)
        # Not legacy leaves out the space that the model puts before every text.
        config = _config("LlamaTokenizer", spell(self.end_id), legacy=True, **named)
        return {"tokenizer.model": self._content, sidecars.CONFIG: config}


def read_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Returns the tokenizer that `data` names, None for one yet to be trained.

    Raises:
      DataError: a tokenizer file that cannot be read, or has no end-of-text token.
    """
    import fsspec

    if data.tokenizer == "bpe":
        return None
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    try:
        filesystem, path = fsspec.core.url_to_fs(data.tokenizer)
        content = filesystem.cat_file(path)
        if data.tokenizer.endswith(".model"):
            return PieceTokenizer(content, data.end_of_text)
        files = sidecars.beside(filesystem, path)
        return JsonTokenizer(content.decode("utf-8"), data.end_of_text, files)
    except (OSError, ValueError, ImportError) as err:
        raise DataError(
            f"data.tokenizer={data.tokenizer!r}; it cannot be read: {err}; give bytes, "
            "bpe, or the path of a tokenizer.json or a SentencePiece .model file."
        ) from err


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Returns a byte-level BPE of `vocab_size` ids, of fewer if `texts` has no more.

    The end of text is id 0 and the 256 bytes follow; the same texts give the same ids.
    """
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = Library(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return JsonTokenizer(library.to_str(), END_OF_TEXT)


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that was saved in `folder`.

    Raises:
      DataError: none was, or not all of it is there.
    """
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["kind"] == "bytes":
            return ByteTokenizer()
        if about["kind"] == "model":
            content = (folder / "tokenizer.model").read_bytes()
            return PieceTokenizer(content, about["end_of_text"])
        text = (folder / "tokenizer.json").read_bytes().decode("utf-8")
        paths = {name: folder / name for name in sidecars.NAMES}
        files = {n: path.read_bytes() for n, path in paths.items() if path.is_file()}
        return JsonTokenizer(text, about["end_of_text"], files)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{folder}; no tokenizer can be read there: {err}; give the folder of a "
            "run that was started on text."
        ) from err


def _write(
    folder: pathlib.Path, files: Mapping[str, bytes], kind: str, end_of_text: str
) -> None:
    """Writes files, none of them half, and last what they are."""
    about = json.dumps({"kind": kind, "end_of_text": end_of_text})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "about.json": about.encode("utf-8")}.items():
        atomic_write(folder / name, content)


def _config(kind: str, end_of_text: str, **more: Any) -> bytes:
    """Returns a tokenizer_config.json under which `transformers` changes no text."""
    content = {
        "tokenizer_class": kind,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(content | more, indent=2).encode("utf-8")


def _digest(content: bytes, end_id: int) -> str:
    return hashlib.sha256(content + f"\n{end_id}".encode()).hexdigest()


def _end_token(vocabulary: Mapping[str, Any], asked: str, named: str = "") -> str:
    """Returns the spelling of the end of text that `vocabulary` has.

    Args:
      asked: by the user, who is told if there is no such token.
      named: by the tokenizer's own files.
    """
    if asked and asked not in vocabulary:
        near = difflib.get_close_matches(asked, vocabulary, n=3, cutoff=0.5)
        raise DataError(
            f"data.end_of_text={asked!r}; the tokenizer has no such token; "
            f"set it to one it has{', such as ' if near else ''}{', '.join(near)}."
        )
    found = [s for s in (asked, named, *_END_SPELLINGS) if s in vocabulary and s]
    if not found:
        spellings = ", ".join(_END_SPELLINGS)
        raise DataError(
            f"data.end_of_text=''; the tokenizer has none of {spellings}; set "
            "data.end_of_text to the token that closes a text."
        )
    return found[0]
