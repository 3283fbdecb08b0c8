"""Tokenizers: text to ids and back, and the files that let a run carry its own.

The spelling of the end-of-text token inside a text is text: it never becomes the id
that separates documents.
"""

import difflib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from scaletrain.config.schema import DataConfig
from scaletrain.errors import DataError

END_OF_TEXT = "<|endoftext|>"
# Spellings of the end of a text in published tokenizers, the likeliest first.
_END_SPELLINGS = (END_OF_TEXT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class Tokenizer(Protocol):
    """Text to ids and back."""

    vocab_size: int  # one more than the largest id, the end of text among them
    end_id: int  # the id that stands between documents
    fingerprint: str  # of everything that decides an id

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the int32 ids of each text; `end_id` is none of them."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`; those without a meaning are left out."""
        ...

    def save(self, folder: pathlib.Path) -> None:
        """Writes what `load_tokenizer` needs into `folder`."""
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

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, U+FFFD in place of bytes that are not UTF-8."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")

    def save(self, folder: pathlib.Path) -> None:
        """Writes that this is the byte tokenizer."""
        _write_about(folder, "bytes", "")


class JsonTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    def __init__(self, content: str, end_of_text: str = ""):
        """Reads `content`; an empty `end_of_text` stands for the usual spellings.

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
        vocabulary = library.get_vocab()
        self._end_of_text = _end_token(vocabulary, end_of_text)
        # Only special tokens can be kept out of texts, and some files do not say so.
        end = AddedToken(self._end_of_text, special=True, normalized=False)
        library.add_special_tokens([end])
        library.encode_special_tokens = True
        library.no_truncation()
        library.no_padding()
        self._library, self._content = library, content
        self.vocab_size = max(vocabulary.values()) + 1
        self.end_id = vocabulary[self._end_of_text]
        self.fingerprint = _digest(content.encode("utf-8"), self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, nothing added before or after it."""
        found = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(each.ids, np.int32) for each in found]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, special tokens spelled out."""
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=False)

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json and its end-of-text token."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(self._content, encoding="utf-8")
        _write_about(folder, "json", self._end_of_text)


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
        self.vocab_size = library.vocab_size()
        self.end_id = library.eos_id()
        if end_of_text or self.end_id < 0:
            pieces = {library.id_to_piece(i): i for i in range(self.vocab_size)}
            self.end_id = pieces[_end_token(pieces, end_of_text)]
        self._library, self._content = library, content
        self._end_of_text = end_of_text
        self.fingerprint = _digest(content, self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text."""
        return [np.array(ids, np.int32) for ids in self._library.encode(list(texts))]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text as the model normalised it."""
        return self._library.decode([int(i) for i in ids if i < self.vocab_size])

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.model and its end-of-text piece."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.model").write_bytes(self._content)
        _write_about(folder, "model", self._end_of_text)


def given(data: DataConfig) -> Tokenizer | None:
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
        return JsonTokenizer(content.decode("utf-8"), data.end_of_text)
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
        text = (folder / "tokenizer.json").read_text(encoding="utf-8")
        return JsonTokenizer(text, about["end_of_text"])
    except (OSError, ValueError, KeyError) as err:
        raise DataError(
            f"{folder}; no tokenizer can be read there: {err}; give the folder of a "
            "run that was started on text."
        ) from err


def _write_about(folder: pathlib.Path, kind: str, end_of_text: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    about = json.dumps({"kind": kind, "end_of_text": end_of_text})
    (folder / "about.json").write_text(about, encoding="utf-8")


def _digest(content: bytes, end_id: int) -> str:
    return hashlib.sha256(content + f"\n{end_id}".encode()).hexdigest()


def _end_token(vocabulary: dict[str, Any], asked: str) -> str:
    """Returns the spelling of the end of text that `vocabulary` has."""
    if asked and asked not in vocabulary:
        near = difflib.get_close_matches(asked, vocabulary, n=3, cutoff=0.5)
        raise DataError(
            f"data.end_of_text={asked!r}; the tokenizer has no such token; "
            f"set it to one it has{', such as ' if near else ''}{', '.join(near)}."
        )
    found = [s for s in (asked, *_END_SPELLINGS) if s in vocabulary and s]
    if not found:
        spellings = ", ".join(_END_SPELLINGS)
        raise DataError(
            f"data.end_of_text=''; the tokenizer has none of {spellings}; set "
            "data.end_of_text to the token that closes a text."
        )
    return found[0]
