"""The protocol of a tokenizer, and the functions that all tokenizers share.

The spelling of the end-of-text token inside a text is text: it never becomes the id
that separates documents.
"""

import difflib
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

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
        """Writes what `reading.load_tokenizer` needs into `folder`."""
        ...

    def published(self) -> dict[str, bytes]:
        """Returns the files from which `transformers` loads the same ids."""
        ...

    def vocabulary(self) -> Mapping[str, int]:
        """Returns the id of each token, the token spelled as its file spells it."""
        ...


def write(
    folder: pathlib.Path, files: Mapping[str, bytes], kind: str, end_of_text: str
) -> None:
    """Writes the files of a tokenizer, each atomically, and last `about.json`.

    Args:
      folder: made if it does not exist.
      files: content by file name.
      kind: "bytes", "json" or "model", see `reading.load_tokenizer`.
      end_of_text: the spelling of that token; "" where the kind implies it.
    """
    about = json.dumps({"kind": kind, "end_of_text": end_of_text})
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in {**files, "about.json": about.encode("utf-8")}.items():
        atomic_write(folder / name, content)


def published_config(kind: str, end_of_text: str, **more: Any) -> bytes:
    """Returns a tokenizer_config.json under which `transformers` changes no text.

    Args:
      kind: the class in `transformers`.
      end_of_text: the spelling of that token.
      more: further keys of the file, which take precedence.
    """
    content = {
        "tokenizer_class": kind,
        "bos_token": end_of_text,
        "eos_token": end_of_text,
        "clean_up_tokenization_spaces": False,
    }
    return json.dumps(content | more, indent=2).encode("utf-8")


def digest(content: bytes, end_id: int) -> str:
    """Returns the fingerprint of a tokenizer's file and its end-of-text id."""
    return hashlib.sha256(content + f"\n{end_id}".encode()).hexdigest()


def end_token(vocabulary: Mapping[str, Any], asked: str, named: str = "") -> str:
    """Returns the spelling of the end of text that `vocabulary` has.

    Args:
      vocabulary: the tokens, as keys.
      asked: the spelling in the settings; "" = none.
      named: the spelling in the tokenizer's own files; "" = none.

    Raises:
      DataError: the vocabulary has not `asked`, or no known spelling.
    """
    if asked and asked not in vocabulary:
        near = difflib.get_close_matches(asked, vocabulary, n=3, cutoff=0.5)
        raise DataError(
            f"data.end_of_text={asked!r}; the tokenizer has no such token; "
            f"set it to one it has{', such as ' if near else ''}{', '.join(near)}."
        )
    present = [s for s in (asked, named, *_END_SPELLINGS) if s in vocabulary and s]
    if not present:
        spellings = ", ".join(_END_SPELLINGS)
        raise DataError(
            f"data.end_of_text=''; the tokenizer has none of {spellings}; set "
            "data.end_of_text to the token that closes a text."
        )
    return present[0]
