"""Conversations on disk, and their packing into windows.

A stream holds conversations end to end: a token in the lower 31 bits of a number, and
in the highest bit whether it belongs to an answer. `<split>.starts.npy` holds the
position of each conversation's first token and the length of the stream,
`<split>.answers.npy` the number of tokens before each conversation's first answer.
"""

import hashlib
import pathlib

import numpy as np

from scaletrain.data.blocks import Stream, StreamWriter
from scaletrain.data.files import door
from scaletrain.errors import DataError

DTYPE = "uint32"  # of a stream of conversations
_ANSWER = np.uint32(2**31)


class ConversationWriter:
    """A writer that appends conversations to a split, complete after `close`."""

    def __init__(self, stem: pathlib.Path):
        self._stream = StreamWriter(stem.with_suffix(".array_record"), DTYPE)
        self._stem, self._starts, self._answers = stem, [0], []

    def add(self, conversations: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends conversations: pairs of ids and of a mask of the answers' ids."""
        for ids, answers in conversations:
            marks = np.where(answers, _ANSWER, np.uint32(0))
            self._stream.add(ids.astype(np.uint32) | marks)
            self._starts.append(self._stream.num_tokens)
            # The first token is never predicted.
            positions = np.flatnonzero(answers[1:])
            first = positions[0] + 1 if len(positions) else len(ids)
            self._answers.append(first)

    def close(self) -> str:
        """Returns a digest of all files, after writing the last of them."""
        digest = hashlib.sha256(self._stream.close().encode())
        for name, values in (("starts", self._starts), ("answers", self._answers)):
            array = np.array(values, np.int64)
            digest.update(array.astype("<i8").tobytes())
            np.save(self._stem.with_suffix(f".{name}.npy"), array)
        return digest.hexdigest()

    def counts(self) -> dict[str, int]:
        """Returns the numbers of `cache.Split`."""
        return {
            "num_tokens": self._stream.num_tokens,
            "num_bytes": 0,  # only the templates' output is known, not the texts
            "num_documents": len(self._answers),
        }


class Windows:
    """Windows of as many complete conversations as fit, in the order of the stream.

    A conversation longer than a window has one alone and loses its end. It is left out
    if no answer begins before that end.
    """

    def __init__(self, path: pathlib.Path, num_tokens: int, seq_len: int):
        """Opens the stream at `path` and assigns its conversations to windows.

        Args:
          path: of the blocks of the stream.
          num_tokens: of the stream.
          seq_len: predictions of a window, which are tokens less one a conversation.

        Raises:
          DataError: the stream is missing or damaged.
        """
        self._stream = Stream(path, num_tokens, DTYPE)
        starts, answers = _load(path, "starts"), _load(path, "answers")
        if len(starts) != len(answers) + 1 or starts[-1] != num_tokens:
            raise _damaged(path, "its starts are those of another stream")
        # n tokens make n - 1 predictions.
        lengths = np.minimum(np.diff(starts) - 1, seq_len)
        kept = answers <= lengths
        self._starts, self._lengths = starts[:-1][kept], lengths[kept]
        ends = np.concatenate([[0], np.cumsum(self._lengths)])
        firsts = [0]
        while firsts[-1] < len(self._lengths):
            room = ends[firsts[-1]] + seq_len
            firsts.append(int(np.searchsorted(ends, room, side="right")) - 1)
        self._firsts = np.array(firsts)

    def __len__(self) -> int:
        return len(self._firsts) - 1

    def __getitem__(self, index: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns (ids, answers) of each conversation in the window, cut to fit."""
        conversations = []
        for place in range(self._firsts[index], self._firsts[index + 1]):
            start = int(self._starts[place])
            stop = start + int(self._lengths[place]) + 1
            # As int32, a number whose highest bit is set is negative.
            tokens = self._stream.window(start, stop)
            conversations.append((tokens & (2**31 - 1), tokens < 0))
        return conversations

    def starts(self, index: int) -> list[int]:
        """Returns the positions in the stream of the conversations of a window."""
        return self._starts[self._firsts[index] : self._firsts[index + 1]].tolist()


def _load(path: pathlib.Path, name: str) -> np.ndarray:
    path = path.with_suffix(f".{name}.npy")
    with door(f"{path}; damaged", f"delete {path.parent}, it is made anew"):
        return np.load(path, allow_pickle=False)


def _damaged(path: pathlib.Path, why: str) -> DataError:
    return DataError(f"{path}; damaged: {why}; delete {path.parent}, it is made anew.")
