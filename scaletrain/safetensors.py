"""Safetensors files: named tensors behind a JSON header, read and written one by one.

The layout is the published one: 8 bytes with the header's length, the header, then the
tensors without gaps. Nothing in a file is executed, and no name in it leads outside the
folder it lies in.
"""

import dataclasses
import json
import math
import pathlib
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from scaletrain.errors import CheckpointError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # bytes; the published limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    name: str
    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    def read(self) -> np.ndarray:
        """Returns the tensor; nothing else of the file is read."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            flat = np.fromfile(file, self.dtype, math.prod(self.shape))
        return flat.reshape(self.shape)


def contents(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint folder, of one file or of indexed shards.

    Raises:
      CheckpointError: naming the file, and the tensor where there is one.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder)
    if (folder / SINGLE).is_file():
        return _header(folder / SINGLE)
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    if shards:
        raise CheckpointError(
            f"{folder / INDEX}; missing, and {shards[0]} is one shard of several; "
            "fetch the index too."
        )
    raise CheckpointError(
        f"{folder}; no {SINGLE} and no {INDEX} there; give a folder that has one "
        "(files of pickles are not read)."
    )


def _indexed(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors that the index names, each from the shard it names."""
    path = folder / INDEX
    try:
        where = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        where = {name: str(shard) for name, shard in where.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(f"{path}; no weight_map can be read in it.") from err
    shards = {}
    for shard in sorted(set(where.values())):
        if pathlib.PurePath(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{path}; it leads outside its folder, to {shard!r}; "
                "do not use this checkpoint."
            )
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}; missing, though {INDEX} names it; fetch it too."
            )
        shards[shard] = _header(folder / shard)
    for name, shard in where.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / shard}; tensor {name} is not in it, though {INDEX} says "
                "so; fetch both again."
            )
    for shard, found in shards.items():
        for name in found.keys() - where.keys():
            raise CheckpointError(
                f"{folder / shard}; tensor {name} is not in {INDEX}; fetch both again."
            )
    return {name: shards[shard][name] for name, shard in where.items()}


def _header(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of one file, whose size must be exactly theirs."""
    size = path.stat().st_size
    with path.open("rb") as file:
        first = file.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else size
        if length + 8 > min(size, _LARGEST_HEADER):
            raise CheckpointError(
                f"{path}; not a safetensors file, or cut off in its header; "
                "fetch it again."
            )
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        found, at = {}, 8 + length
        for name, entry in sorted(
            header.items(), key=lambda item: item[1]["data_offsets"]
        ):
            start, stop = entry["data_offsets"]
            shape = tuple(map(int, entry["shape"]))
            if entry["dtype"] not in DTYPES:
                raise CheckpointError(
                    f"{path}; tensor {name} holds {entry['dtype']}; only "
                    f"{', '.join(DTYPES)} can be imported."
                )
            dtype = DTYPES[entry["dtype"]]
            if (
                start + 8 + length != at
                or stop - start != math.prod(shape) * dtype.itemsize
                or min(shape, default=1) < 0
            ):
                raise CheckpointError(
                    f"{path}; tensor {name} does not lie where its shape "
                    f"{list(shape)} puts it; fetch the file again."
                )
            found[name] = Stored(name, path, dtype, shape, at)
            at += stop - start
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{path}; its header cannot be read; fetch it again."
        ) from err
    if at != size:
        last = next(reversed(found), "none")
        raise CheckpointError(
            f"{path}; {size} bytes where its tensors (the last is {last}) end at {at}; "
            "it is cut off or damaged; fetch it again."
        )
    return found


def write_file(
    path: pathlib.Path,
    names: Iterable[str],
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one file of the tensors `names`; see `write`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in names:
        shape, dtype = tensors[name]
        stop = at + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [at, stop],
        }
        at = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype = tensors[name]
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shape, dtype), name
            np.ascontiguousarray(tensor).tofile(file)


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint folder's tensors, each asked for when its turn comes.

    Args:
      tensors: name -> shape and format.
      read: name -> the tensor.
      shard_bytes: what a file holds at most; a larger tensor has one of its own.
    """
    sizes = {
        name: math.prod(shape) * dtype.itemsize
        for name, (shape, dtype) in tensors.items()
    }
    shards = list(_shards(sizes, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], tensors, read)
        return
    where = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(path, names, tensors, read)
        where |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], most: int) -> Iterator[list[str]]:
    shard, filled = [], 0
    for name, size in sizes.items():
        if shard and filled + size > most:
            yield shard
            shard, filled = [], 0
        shard.append(name)
        filled += size
    yield shard
