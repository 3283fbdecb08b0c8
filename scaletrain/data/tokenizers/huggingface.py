"""Tokenizers in a tokenizer.json of the Hugging Face `tokenizers` library."""

import functools
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from scaletrain.data.chats import ChatTemplate, Message, Tool
from scaletrain.data.tokenizers import beside
from scaletrain.data.tokenizers.protocol import (
    END_OF_TEXT,
    digest,
    end_token,
    published_config,
    write,
)
from scaletrain.errors import DataError


class JsonTokenizer:
    """A tokenizer.json of the Hugging Face `tokenizers` library."""

    def __init__(
        self,
        content: str,
        end_of_text: str = "",
        files: beside.Sidecars | None = None,
    ):
        """Reads `content`.

        Args:
          content: of tokenizer.json.
          end_of_text: that token; "" = the one `files` name, or a usual spelling.
          files: the files beside tokenizer.json, see `beside`.

        Raises:
          ValueError: not a tokenizer.
          DataError: no such end-of-text token.
        """
        from tokenizers import AddedToken
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_str(content)
        except Exception as err:  # the library raises no narrower class
            raise ValueError(f"it is not a tokenizer.json: {err}") from err
        self._files = dict(files or {})
        self._special_tokens = beside.special_tokens(self._files)
        self._template = beside.chat_template(self._files)
        vocabulary = library.get_vocab()
        named = self._special_tokens.get("eos_token", "")
        self._end_of_text = end_token(vocabulary, end_of_text, named)
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
        self.fingerprint = digest(decisive.encode("utf-8"), self.end_id)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of each text, nothing added before or after it."""
        encodings = self._library.encode_batch_fast(
            list(texts), add_special_tokens=False
        )
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def prompt(self, text: str) -> list[int]:
        """Returns the ids that `transformers` gives `text` if the file has its config.

        A tokenizer without one was trained by scaletrain, which puts an end of text
        before every document, and so before `text`.
        """
        if beside.CONFIG not in self._files:
            return [self.end_id, *self.encode_batch([text])[0].tolist()]
        # These two take precedence over the framing in tokenizer.json.
        framing = {"add_bos_token", "add_eos_token"} & set(beside.config(self._files))
        ids = self._open_library.encode(text, add_special_tokens=not framing).ids
        ids = [*self._asked("bos"), *ids, *self._asked("eos")]
        return ids or [self.end_id]

    def _asked(self, name: str) -> list[int]:
        """Returns the token that tokenizer_config.json puts around every text."""
        asked = beside.config(self._files).get(f"add_{name}_token")
        token = self._special_tokens.get(f"{name}_token", "")
        token_id = self._open_library.token_to_id(token) if asked else None
        return [] if token_id is None else [token_id]

    def chat(
        self, messages: Sequence[Message], tools: Sequence[Tool] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the int32 ids of a conversation, and a mask of the answers' ids.

        A token belongs to an answer if its first character is one that an assistant's
        message adds.

        Raises:
          DataError: no chat template, or one that does not write these messages or
            any of these tools.
        """
        text, spans = self._chat_template.answers(messages, tools)
        encoding = self._chat_library.encode(text, add_special_tokens=False)
        answered = np.zeros(len(text) + 1, bool)
        for start, stop in spans:
            answered[start:stop] = True
        firsts = np.array([start for start, _ in encoding.offsets], np.int64)
        return np.array(encoding.ids, np.int32), answered[firsts]

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
        """The tokenizer that parses special tokens in texts, unlike the default."""
        return _parsing_special(self._content, self._special_tokens)

    @functools.cached_property
    def _chat_library(self) -> Any:
        # Without the framing, which the template writes; some framings also move
        # the offsets of tokens that begin with a space.
        content = json.loads(self._content) | {"post_processor": None}
        return _parsing_special(json.dumps(content), self._special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text, special tokens spelled out."""
        known = [int(i) for i in ids if i < self.vocab_size]
        return self._library.decode(known, skip_special_tokens=False)

    def save(self, folder: pathlib.Path) -> None:
        """Writes tokenizer.json, the files beside it, and its end-of-text token."""
        write(folder, self._everything(), "json", self._end_of_text)

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the ids of the tokens, special ones among them."""
        return self._library.get_vocab()

    def published(self) -> dict[str, bytes]:
        """Returns the tokenizer's files, with a config if there was none."""
        config = published_config("PreTrainedTokenizerFast", self._end_of_text)
        return {beside.CONFIG: config} | self._everything()

    def _everything(self) -> dict[str, bytes]:
        return self._files | {"tokenizer.json": self._content.encode("utf-8")}


def _parsing_special(content: str, special_tokens: Mapping[str, str]) -> Any:
    """Returns the library's tokenizer that parses special tokens in texts.

    Args:
      content: of tokenizer.json.
      special_tokens: spellings that count as special although `content` may not say so.
    """
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as Library

    library = Library.from_str(content)
    library.no_truncation()
    library.no_padding()
    listed = {t.content for t in library.get_added_tokens_decoder().values()}
    known = set(library.get_vocab())
    unlisted = known.intersection(special_tokens.values()) - listed
    tokens = [AddedToken(t, normalized=False) for t in sorted(unlisted)]
    library.add_special_tokens(tokens)
    return library


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Returns a byte-level BPE of `vocab_size` ids, or fewer if pairs run out.

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
