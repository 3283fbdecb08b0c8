"""Byte counts, and the bits per byte of models that only count: a baseline."""

import pathlib
from collections.abc import Sequence

import numpy as np

from scaletrain.data.files import door


class ByteCounts:
    """Counts of bytes, and of pairs of neighbouring bytes inside a document."""

    def __init__(self):
        self.order0 = np.zeros(256, np.int64)
        self.order1 = np.zeros((256, 256), np.int64)  # [the byte before, the byte]

    def add(self, documents: Sequence[bytes]) -> None:
        """Counts the bytes of complete documents."""
        text = np.frombuffer(b"".join(documents), np.uint8)
        pairs = text[:-1].astype(np.uint16) * 256 + text[1:]
        ends = np.cumsum([len(document) for document in documents])[:-1] - 1
        inside = np.delete(pairs, ends)
        self.order0 += np.bincount(text, minlength=256)
        self.order1 += np.bincount(inside, minlength=256 * 256).reshape(256, 256)

    def save(self, path: pathlib.Path) -> None:
        """Writes the counts to a .npz file."""
        np.savez(path, order0=self.order0, order1=self.order1)

    @classmethod
    def load(cls, path: pathlib.Path) -> "ByteCounts":
        """Returns the counts of a .npz file.

        Raises:
          DataError: the file is missing or damaged.
        """
        counts = cls()
        with (
            door(f"{path}; damaged", f"delete {path.parent}, it is made anew"),
            np.load(path, allow_pickle=False) as stored,
        ):
            counts.order0, counts.order1 = stored["order0"], stored["order1"]
        return counts


def bits_per_byte(train: ByteCounts, split: ByteCounts) -> dict[str, float]:
    """Returns the bits per byte of `split` under the models that count `train`.

    Both models add one to every count. `order1` knows the byte before, and uses
    `order0` for the first byte of a document. The ends of documents cost nothing.
    """
    cost0 = -np.log2((train.order0 + 1) / (train.order0.sum() + 256))
    before = train.order1.sum(axis=1, keepdims=True)
    cost1 = -np.log2((train.order1 + 1) / (before + 256))
    first = split.order0 - split.order1.sum(axis=0)
    total = split.order0.sum()
    order1 = (split.order1 * cost1).sum() + first @ cost0
    order0 = split.order0 @ cost0
    return {"order0": float(order0 / total), "order1": float(order1 / total)}
