"""Conversations on disk, and which of them share a window.

A stream holds them end to end, a token in the lower 31 bits and in the highest one
whether it answers. `<split>.starts.npy` has the place where each begins and the length
of the stream, `<split>.answers.npy` how many tokens stand before its first answer.
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
    """Appends conversations to a split; nothing is whole before `close`."""

    def __init__(self, stem: pathlib.Path):
        self._stream = StreamWriter(stem.with_suffix(".array_record"), DTYPE)
        self._stem, self._starts, self._answers = stem, [0], []

    def add(self, conversations: list[tuple[np.ndarray, np.ndarray]]) -> None:
        """Appends conversations: their ids, and which of them answer."""
        for ids, answers in conversations:
            marks = np.where(answers, _ANSWER, np.uint32(0))
            self._stream.add(ids.astype(np.uint32) | marks)
            self._starts.append(self._stream.num_tokens)
            # The first token is never predicted.
            found = np.flatnonzero(answers[1:])
            self._answers.append(found[0] + 1 if len(found) else len(ids))

    def close(self) -> str:
        """Writes what is left; returns a digest of it all."""
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
            "num_bytes": 0,  # of texts there are none, only of their templates
            "num_documents": len(self._answers),
        }


class Windows:
    """As many whole conversations as fit, one window after another.

    One that is longer than a window has it alone, and loses its end. One that has no
    answer before that is left out.
    """

    def __init__(self, path: pathlib.Path, num_tokens: int, seq_len: int):
        """Opens the stream at `path` and shares it out.

        Raises:
          DataError: it is missing or damaged.
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
        """Returns (ids, answers) of each conversation in the window, as it was cut."""
        found = []
        for place in range(self._firsts[index], self._firsts[index + 1]):
            start = int(self._starts[place])
            stop = start + int(self._lengths[place]) + 1
            tokens = self._stream.window(
                start, stop
            )  # negative: the highest bit is set
            found.append((tokens & (2**31 - 1), tokens < 0))
        return found

    def starts(self, index: int) -> list[int]:
        """Returns where in the stream the conversations of a window begin."""
        return self._starts[self._firsts[index] : self._firsts[index + 1]].tolist()


def _load(path: pathlib.Path, name: str) -> np.ndarray:
    path = path.with_suffix(f".{name}.npy")
    with door(f"{path}; damaged", f"delete {path.parent}, it is made anew"):
        return np.load(path, allow_pickle=False)


def _damaged(path: pathlib.Path, why: str) -> DataError:
    return DataError(f"{path}; damaged: {why}; delete {path.parent}, it is made anew.")
