"""Tokenizers in a SentencePiece model."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scaletrain.data.tokenizers import beside
from scaletrain.data.tokenizers.protocol import (
    digest,
    end_token,
    published_config,
    write,
)
from scaletrain.errors import DataError


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
            self.end_id = pieces[end_token(pieces, end_of_text)]
        self._content = content
        self._end_of_text = end_of_text
        self.fingerprint = digest(content, self.end_id)

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
        write(folder, {"tokenizer.model": self._content}, "model", self._end_of_text)

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of the pieces."""
        return {self._library.id_to_piece(i): i for i in range(self.vocab_size)}

    def published(self) -> dict[str, bytes]:
        """Returns the model's file, with a config that declares a Llama tokenizer.

        Raises:
          DataError: `transformers` would make other ids of it.
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
        config = published_config(
            "LlamaTokenizer", spell(self.end_id), legacy=True, **named
        )
        return {"tokenizer.model": self._content, beside.CONFIG: config}
