"""Token streams on disk: ArrayRecord files of equal blocks, any window in O(1)."""

import contextlib
import hashlib
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from scaletrain.errors import DataError

BLOCK = 8192  # tokens of a record; the last record holds the remainder


class StreamWriter:
    """A writer that appends tokens to a stream; the file is complete after `close`.

    All methods raise OSError where the disk refuses.
    """

    def __init__(self, path: pathlib.Path, dtype: str):
        # Grain reads single records, so larger groups would be read in vain. Tokens
        # hardly compress, and uncompressed ones are read in half the time.
        options = "group_size:1,uncompressed"
        with _as_os_error():
            self._writer = ArrayRecordWriter(str(path), options)
        self._pending = np.zeros(0, dtype)
        self._digest = hashlib.sha256()
        self.num_tokens = 0

    def add(self, tokens: np.ndarray) -> None:
        """Appends `tokens`, which the stream's dtype can hold."""
        self.num_tokens += len(tokens)
        tokens = np.concatenate([self._pending, tokens.astype(self._pending.dtype)])
        num_full = len(tokens) // BLOCK * BLOCK  # tokens in full blocks
        for start in range(0, num_full, BLOCK):
            self._write(tokens[start : start + BLOCK])
        self._pending = tokens[num_full:]

    def close(self) -> str:
        """Returns the SHA-256 of all tokens, after writing the last ones."""
        if len(self._pending):
            self._write(self._pending)
        with _as_os_error():
            self._writer.close()
        return self._digest.hexdigest()

    def _write(self, block: np.ndarray) -> None:
        content = block.astype(block.dtype.newbyteorder("<")).tobytes()
        self._digest.update(content)
        with _as_os_error():
            self._writer.write(content)


@contextlib.contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except RuntimeError as err:  # the only error that the writer raises
        raise OSError(str(err)) from err


class Stream:
    """The tokens of a file by their position; threads may share a stream."""

    def __init__(self, path: pathlib.Path, num_tokens: int, dtype: str):
        """Opens the file.

        Args:
          path: of the blocks.
          num_tokens: the length that the index of the cache gives.
          dtype: of a token on disk, in NumPy's spelling.

        Raises:
          DataError: the file is missing, damaged, or not `num_tokens` long.
        """
        self._path, self._num_tokens = path, num_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        try:
            self._blocks: Any = grain.sources.ArrayRecordDataSource(str(path))
        except RuntimeError as err:
            raise self._damaged(str(err)) from err
        if len(self._blocks) != -(-num_tokens // BLOCK):
            raise self._damaged(f"{len(self._blocks)} blocks for {num_tokens} tokens")

    def window(self, start: int, stop: int) -> np.ndarray:
        """Returns the tokens from `start` up to `stop`, as int32.

        Raises:
          DataError: the file was damaged since it was opened.
        """
        assert 0 <= start < stop <= self._num_tokens
        first, last = start // BLOCK, (stop - 1) // BLOCK
        try:
            # Every block carries its checksum; a flipped bit raises here.
            content = b"".join(self._blocks[i] for i in range(first, last + 1))
        except RuntimeError as err:
            raise self._damaged(str(err)) from err
        tokens = np.frombuffer(content, self._dtype)
        return tokens[start - first * BLOCK : stop - first * BLOCK].astype(np.int32)

    def _damaged(self, why: str) -> DataError:
        remedy = f"delete {self._path.parent}, it is made anew"
        return DataError(f"{self._path}; the cache is damaged: {why}; {remedy}.")
