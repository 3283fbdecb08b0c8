"""The byte tokenizer, which needs no file."""

import pathlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from scaletrain.data.tokenizers import beside
from scaletrain.data.tokenizers.protocol import END_OF_TEXT, published_config, write


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
        write(folder, {}, "bytes", "")

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
        in_alphabet = {ord(letter) for letter in letters}
        others = (byte for byte in range(256) if byte not in in_alphabet)
        ids = {c: ord(c) if ord(c) < 256 else next(others) for c in letters}
        library = Library(models.BPE(vocab=ids, merges=[]))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = decoders.ByteLevel()
        library.add_special_tokens([AddedToken(END_OF_TEXT, normalized=False)])
        assert library.token_to_id(END_OF_TEXT) == self.end_id
        return {
            "tokenizer.json": library.to_str().encode("utf-8"),
            beside.CONFIG: published_config("PreTrainedTokenizerFast", END_OF_TEXT),
        }
