"""Documents to token streams, in one pass and bounded memory."""

import hashlib
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np

from scaletrain.config.schema import DataConfig, RunConfig
from scaletrain.data.blocks import StreamWriter
from scaletrain.data.chats import messages_of, tools_of
from scaletrain.data.counts import ByteCounts
from scaletrain.data.packing import DTYPE, ConversationWriter
from scaletrain.data.sources import Document, documents, rows
from scaletrain.data.tokenizers import JsonTokenizer, Tokenizer, train_bpe
from scaletrain.errors import DataError

_CHUNK = 2**20  # characters that are tokenised at once; a longer document is a chunk
_BPE_CHARACTERS = 20_000_000  # of the training documents a tokenizer is trained on
_SAY_EVERY_S = 10.0


def split_of(name: str, validation_fraction: float) -> str:
    """Returns the split of a document: its name decides, not its place or a seed."""
    # A file's name may be any bytes, which Python keeps as surrogates.
    content = name.encode("utf-8", "surrogateescape")
    hashed = int.from_bytes(hashlib.sha256(content).digest()[:8], "big")
    return "validation" if hashed / 2**64 < validation_fraction else "train"


def tokenise(
    run: RunConfig,
    tokenizer: Tokenizer | None,
    folder: pathlib.Path,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Returns the content of the cache's index, after writing the splits.

    Args:
      run: the settings.
      tokenizer: None = train one on the training documents, and save it in `folder`.
      folder: an empty folder for the splits.
      say: prints a line of progress for the user.

    Raises:
      DataError: documents that cannot be read, or a split without documents.
    """
    began = time.monotonic()
    if tokenizer is None:
        tokenizer = _trained(run, folder, say)
    stems = {name: folder / name for name in ("train", "validation")}
    writers: dict[str, Any]
    if run.data.format == "chat":
        dtype, chunks = DTYPE, _conversations(run, tokenizer)
        writers = {n: ConversationWriter(stem) for n, stem in stems.items()}
    else:
        dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        chunks, end_id = _texts(run, tokenizer), tokenizer.end_id
        writers = {n: _SplitWriter(stem, dtype, end_id) for n, stem in stems.items()}
    reported = time.monotonic()
    for chunk in chunks:
        assigned = [split_of(name, run.data.validation_fraction) for name, _ in chunk]
        for name, writer in writers.items():
            pairs = zip(chunk, assigned, strict=True)
            writer.add([content for (_, content), split in pairs if split == name])
        if time.monotonic() - reported > _SAY_EVERY_S:
            say(f"tokenising ... {_amount(writers)}")
            reported = time.monotonic()
    _check(run.data, {n: w.counts()["num_documents"] for n, w in writers.items()})
    content = hashlib.sha256(tokenizer.fingerprint.encode())
    splits = {}
    for name, writer in writers.items():
        content.update(writer.close().encode())
        splits[name] = writer.counts()
    num_tokens = sum(split["num_tokens"] for split in splits.values())
    say(
        f"tokenised {_amount(writers)} into {num_tokens / 1e6:.2f} M tokens "
        f"in {time.monotonic() - began:.1f} s"
    )
    return {
        "dtype": dtype,
        "tokenizer": tokenizer.fingerprint,
        "fingerprint": content.hexdigest(),
        "splits": splits,
    }


def _texts(run: RunConfig, tokenizer: Tokenizer) -> Iterator[list[tuple[str, Any]]]:
    """Yields chunks of (name, (document, ids))."""
    for chunk in _chunks(documents(run.data)):
        ids = tokenizer.encode_batch([document.text for document in chunk])
        for document, each in zip(chunk, ids, strict=True):
            _check_rows(document.name, each, run, tokenizer)
        yield [(d.name, (d, i)) for d, i in zip(chunk, ids, strict=True)]


def _conversations(
    run: RunConfig, tokenizer: Tokenizer
) -> Iterator[list[tuple[str, Any]]]:
    """Yields chunks of (name, (ids, answers))."""
    assert isinstance(tokenizer, JsonTokenizer), "the rules let no other through"
    for name, row in rows(run.data):
        try:
            ids, answers = tokenizer.chat(messages_of(row), tools_of(row))
        except DataError as err:
            raise DataError(f"{name}; {err}") from err
        _check_rows(name, ids, run, tokenizer)
        yield [(name, (ids, answers))]


def _check_rows(
    name: str, ids: np.ndarray, run: RunConfig, tokenizer: Tokenizer
) -> None:
    """Refuses a token for which the model has no row."""
    largest, vocab_size = int(ids.max(initial=tokenizer.end_id)), run.model.vocab_size
    if largest >= vocab_size:
        raise DataError(
            f"{name}; its token {largest} ({tokenizer.decode([largest])!r}) has no row "
            f"in a model of model.vocab_size={vocab_size}; leave this document out."
        )


def _amount(writers: dict[str, Any]) -> str:
    """Returns the amount of text that was read, for the user."""
    counts = [writer.counts() for writer in writers.values()]
    if num_bytes := sum(count["num_bytes"] for count in counts):
        return f"{num_bytes / 1e6:.1f} MB"
    return f"{sum(count['num_documents'] for count in counts)} conversations"


class _SplitWriter:
    """The stream, the counts and the byte statistics of one split."""

    def __init__(self, stem: pathlib.Path, dtype: str, end_id: int):
        self._stream = StreamWriter(stem.with_suffix(".array_record"), dtype)
        self._bytes, self._bytes_path = ByteCounts(), stem.with_suffix(".npz")
        self._end = np.array([end_id])
        self.num_bytes = self.num_documents = 0

    def add(self, rows: list[tuple[Document, np.ndarray]]) -> None:
        """Appends documents, each behind an end of text."""
        if not rows:
            return
        parts = []
        for document, tokens in rows:
            if np.any(tokens == self._end):
                raise DataError(
                    f"{document.name}; the tokenizer makes its end of text out of this "
                    "document's text; set data.end_of_text to a token that no text has."
                )
            parts += [self._end, tokens]
        self._stream.add(np.concatenate(parts))
        encoded = [document.text.encode("utf-8") for document, _ in rows]
        self._bytes.add(encoded)
        self.num_bytes += sum(map(len, encoded))
        self.num_documents += len(rows)

    def close(self) -> str:
        """Returns a digest of the tokens, after closing the files."""
        if self.num_documents:
            self._stream.add(self._end)
        self._bytes.save(self._bytes_path)
        return self._stream.close()

    def counts(self) -> dict[str, int]:
        """Returns the numbers of `cache.Split`."""
        return {
            "num_tokens": self._stream.num_tokens,
            "num_bytes": self.num_bytes,
            "num_documents": self.num_documents,
        }


def _trained(run: RunConfig, folder: pathlib.Path, say: Callable) -> Tokenizer:
    vocab_size = run.model.vocab_size
    say(f"training a byte-level BPE tokenizer of {vocab_size} ids")
    tokenizer = train_bpe(_training_texts(run.data), vocab_size)
    if tokenizer.vocab_size < vocab_size:
        say(
            f"model.vocab_size={vocab_size}; the training documents have pairs for "
            f"{tokenizer.vocab_size} ids only; the rest of the table stays unused."
        )
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def _training_texts(data: DataConfig) -> Iterator[str]:
    """Yields the first training documents, up to `_BPE_CHARACTERS` in total."""
    left = _BPE_CHARACTERS
    for document in documents(data):
        if split_of(document.name, data.validation_fraction) == "train":
            yield document.text[:left]
            left -= len(document.text)
        if left <= 0:
            return


def _chunks(texts: Iterable[Document]) -> Iterator[list[Document]]:
    """Yields lists of documents, long enough to occupy the tokenizer's threads."""
    chunk, size = [], 0
    for document in texts:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _check(data: DataConfig, num_documents: dict[str, int]) -> None:
    """Raises DataError if a split that was asked for has no documents."""
    total, fraction = sum(num_documents.values()), data.validation_fraction
    where = f"data.path={data.path!r}" if data.path else f"data.source={data.source}"
    if total == 0:
        raise DataError(f"{where}; it has no text at all; name files that have some.")
    for name, count in num_documents.items():
        if count == 0 and (name == "train" or fraction > 0):
            remedy = "lower" if name == "train" else "raise"
            off = "" if name == "train" else ", or set it to 0 and evaluate nothing"
            raise DataError(
                f"data.validation_fraction={fraction}; none of the {total} documents "
                f"falls to the {name} split; {remedy} it, cut the corpus into more "
                f"documents{off}."
            )
