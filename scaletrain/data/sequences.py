"""Windows of a token stream as training examples, by number."""

from typing import Protocol

import numpy as np

from scaletrain.config.schema import RunConfig
from scaletrain.data.blocks import BLOCK, Stream
from scaletrain.data.cache import Corpus, Split
from scaletrain.data.packing import Windows
from scaletrain.errors import DataError

# The arrays of an example; each is [seq_len].
FIELDS = {
    "tokens": np.int32,
    "targets": np.int32,  # the tokens one position later
    "segments": np.int32,  # documents numbered from 1; 0 is padding
    "positions": np.int32,  # in the document, or in the window if it began before
    "weights": np.float32,  # 1 where the target counts, 0 where not and for padding
}
_NUM_SYNTHETIC = {"train": 2**20, "validation": 64}


class Sequences(Protocol):
    """Examples of `seq_len` tokens in any order; threads may share them."""

    split: Split | None  # None where bits per byte are not defined
    seq_len: int

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, np.ndarray]: ...

    def documents(self, index: int) -> list[int]:
        """Returns the ids of an example's documents: their positions in the stream."""
        ...


def sequences(corpus: Corpus, split: str, run: RunConfig) -> Sequences:
    """Returns the examples of "train" or "validation".

    Training drops the incomplete sequence at the end of the stream; validation pads it.
    Conversations are not cut across windows, see `packing`.

    Args:
      corpus: see `cache.prepare`.
      split: "train" or "validation".
      run: the settings; `seq_len` and `data.format` decide the examples.

    Raises:
      DataError: no such split, a training split of less than one sequence, or
        conversations none of which is answered within one.
    """
    if split not in _NUM_SYNTHETIC:
        raise DataError(f"split={split!r}; there are {' and '.join(_NUM_SYNTHETIC)}.")
    if corpus.tokenizer is None:
        return RandomSequences(run, split)
    stream = corpus.splits[split]
    if run.data.format == "chat":
        return ChatSequences(stream, run.seq_len)
    if split == "train" and stream.num_tokens < run.seq_len + 1:
        raise DataError(
            f"seq_len={run.seq_len}; the training split has only {stream.num_tokens} "
            f"tokens; set seq_len to at most {stream.num_tokens - 1}, or give more "
            "text."
        )
    num_full, rest = divmod(max(stream.num_tokens - 1, 0), run.seq_len)
    keep_rest = split == "validation" and rest > 0
    return StreamSequences(stream, run.seq_len, num_full + keep_rest)


def blank(seq_len: int) -> dict[str, np.ndarray]:
    """Returns an example that is padding from end to end."""
    return {name: np.zeros(seq_len, dtype) for name, dtype in FIELDS.items()}


class StreamSequences:
    """Examples of a token stream; number i predicts tokens from i * seq_len + 1 on."""

    def __init__(self, split: Split, seq_len: int, num_sequences: int):
        self.split: Split | None = split
        self.seq_len = seq_len
        self._num_sequences = num_sequences
        self._num_tokens, self._end_id = split.num_tokens, split.end_id
        self._stream = Stream(split.path, split.num_tokens, split.dtype)

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self._num_tokens)
        return _example(self._stream.window(start, stop), self._end_id, self.seq_len)

    def documents(self, index: int) -> list[int]:
        """Returns the positions of the ends of text before the documents, in order."""
        start = index * self.seq_len
        stop = min(start + self.seq_len, self._num_tokens - 1)
        ends = np.flatnonzero(self._stream.window(start, stop) == self._end_id) + start
        positions = [int(end) for end in ends]
        if positions[:1] == [start]:
            return positions
        # The stream begins with an end of text: the search backwards ends.
        while True:
            start, stop = max(start - BLOCK, 0), start
            before = np.flatnonzero(self._stream.window(start, stop) == self._end_id)
            if len(before):
                return [start + int(before[-1]), *positions]


class ChatSequences:
    """Examples of conversations: each is a segment, and its answers are the targets."""

    # Bits per byte would need the bytes of the answers, which are not counted.
    split: Split | None = None

    def __init__(self, split: Split, seq_len: int):
        self.seq_len = seq_len
        self._windows = Windows(split.path, split.num_tokens, seq_len)
        if split.num_documents and not len(self._windows):
            raise DataError(
                f"seq_len={seq_len}; none of the {split.num_documents} conversations "
                f"in {split.path.stem} is answered within it; raise seq_len, or "
                "shorten what stands before the answers."
            )

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        example, start = blank(self.seq_len), 0
        for segment, (ids, answers) in enumerate(self._windows[index], start=1):
            places = slice(start, start + len(ids) - 1)
            example["tokens"][places] = ids[:-1]
            example["targets"][places] = ids[1:]
            example["segments"][places] = segment
            example["positions"][places] = np.arange(len(ids) - 1)
            example["weights"][places] = answers[1:]
            start = places.stop
        return example

    def documents(self, index: int) -> list[int]:
        """Returns the positions of the first tokens of the conversations, in order."""
        return self._windows.starts(index)


class RandomSequences:
    """Examples of uniform random tokens, which need no files."""

    split: Split | None = None

    def __init__(self, run: RunConfig, split: str):
        self.seq_len = run.seq_len
        self._vocab_size, self._seed = run.model.vocab_size, run.seed
        self._num_sequences = _NUM_SYNTHETIC[split]
        # The numbers of the validation examples go on after the training ones.
        self._first = 0 if split == "train" else _NUM_SYNTHETIC["train"]

    def __len__(self) -> int:
        return self._num_sequences

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sequence {index} of {len(self)}")
        rng = np.random.default_rng((self._seed, self._first + index))
        window = rng.integers(0, self._vocab_size, self.seq_len + 1, dtype=np.int32)
        return _example(window, -1, self.seq_len)

    def documents(self, index: int) -> list[int]:
        """Returns the example's number, for each example is one document."""
        return [index]


def _example(window: np.ndarray, end_id: int, seq_len: int) -> dict[str, np.ndarray]:
    """Returns the example of a window of at most seq_len + 1 tokens."""
    real = len(window) - 1
    starts = window[:-1] == end_id
    starts[0] = True  # also of a window that begins inside a document
    places = np.arange(real, dtype=np.int32)
    example = blank(seq_len)
    example["tokens"][:real] = window[:-1]
    example["targets"][:real] = window[1:]
    example["segments"][:real] = np.cumsum(starts)
    example["positions"][:real] = places - np.maximum.accumulate(places * starts)
    example["weights"][:real] = 1.0
    return example
