"""Safetensors files: named tensors behind a JSON header, read and written one by one.

The layout is the published one: 8 bytes with the header's length, the header, then the
tensors without gaps. Nothing in a file is executed, and no name in it leads outside the
folder it lies in.

The `safetensors` package is not used: bfloat16 tensors failed with numpy and jax in its
releases up to 0.5.3 (its issues 598 and 382).
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
# Masks, positions and quantised weights may lie beside a model's weights: headers with
# these formats are read, but no weights are imported from them.
_OTHERS = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
_NAMES = {dtype: name for name, dtype in (DTYPES | _OTHERS).items()}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_LARGEST_HEADER = 100_000_000  # bytes; the published limit


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor's place, format and shape in a file."""

    name: str
    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int  # byte in the file

    def check_format(self) -> None:
        """Raises CheckpointError if no weights can be read from its format."""
        if self.dtype not in DTYPES.values():
            raise _format(self.path, self.name, _NAMES[self.dtype])

    def read(self) -> np.ndarray:
        """Returns the tensor; nothing else of the file is read.

        Raises:
          CheckpointError: the file can no longer be read where the tensor lies.
        """
        try:
            with self.path.open("rb") as file:
                file.seek(self.start)
                flat = np.fromfile(file, self.dtype, math.prod(self.shape))
            return flat.reshape(self.shape)
        except (OSError, ValueError) as err:
            raise CheckpointError(
                f"{self.path}; tensor {self.name} cannot be read: {err}; "
                "fetch the file again."
            ) from err


def nbytes(shape: Iterable[int], dtype: np.dtype) -> int:
    """Returns the bytes of a tensor in a file."""
    return math.prod(shape) * dtype.itemsize


def json_object(path: pathlib.Path) -> dict[str, Any]:
    """Returns the object of a JSON file beside the tensors.

    Raises:
      CheckpointError: it is missing, or not a JSON object.
    """
    try:
        return _object(path.read_bytes())
    except FileNotFoundError as err:
        raise CheckpointError(f"{path}; missing; fetch it too.") from err
    except (OSError, ValueError) as err:
        raise CheckpointError(
            f"{path}; it cannot be read: {err}; fetch it again."
        ) from err


def _object(text: bytes) -> dict[str, Any]:
    """Returns a JSON object; raises ValueError where it is none."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"{twice} is there twice")
        return content

    try:
        content = json.loads(text.decode("utf-8-sig"), object_pairs_hook=unique)
    except RecursionError as err:
        raise ValueError("it nests too deeply") from err
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def contents(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of a checkpoint folder, of one file or of indexed shards.

    Raises:
      CheckpointError: naming the file, and the tensor where there is one.
    """
    try:
        if (folder / INDEX).is_file():
            return _indexed(folder)
        if (folder / SINGLE).is_file():
            return _header(folder / SINGLE)
    except OSError as err:
        raise CheckpointError(
            f"{folder}; {err.filename or 'a file'} cannot be read: {err.strerror}; "
            "make it readable."
        ) from err
    shards = sorted(p.name for p in folder.glob("*.safetensors") if p.is_file())
    if shards:
        raise CheckpointError(
            f"{folder / INDEX}; missing, and {shards[0]} is one shard of several; "
            "fetch the index too."
        )
    pickles = sorted(p.name for end in _PICKLES for p in folder.glob(end))
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]}; a pickle, which can run whatever its author "
            "liked; fetch the model's .safetensors, or convert it where that does "
            "no harm (save_pretrained of transformers)."
        )
    raise CheckpointError(
        f"{folder}; no {SINGLE} and no {INDEX} there; give a folder that has one."
    )


def _indexed(folder: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors that the index names, each from the shard it names."""
    shard_of, shards = _weight_map(folder / INDEX), {}
    for shard in sorted(set(shard_of.values())):
        if not (folder / shard).is_file():
            raise CheckpointError(
                f"{folder / shard}; missing, though {INDEX} names it; fetch it too."
            )
        shards[shard] = _header(folder / shard)
    for name, shard in shard_of.items():
        if name not in shards[shard]:
            raise CheckpointError(
                f"{folder / shard}; tensor {name} is not in it, though {INDEX} says "
                "so; fetch both again."
            )
    for shard, tensors in shards.items():
        for name in tensors:
            if shard_of.get(name) != shard:
                elsewhere = f"in {shard_of[name]} by" if name in shard_of else "not in"
                raise CheckpointError(
                    f"{folder / shard}; tensor {name} is {elsewhere} {INDEX}; "
                    "fetch both again."
                )
    return {name: shards[shard][name] for name, shard in shard_of.items()}


def _weight_map(path: pathlib.Path) -> dict[str, str]:
    """Returns the shard of each tensor, a file name in the index's folder."""
    shard_of = json_object(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(
        isinstance(shard, str) for shard in shard_of.values()
    ):
        raise CheckpointError(
            f"{path}; no weight_map can be read in it; fetch it again."
        )
    for shard in shard_of.values():
        if pathlib.PurePath(shard).name != shard or shard in ("", ".", ".."):
            raise CheckpointError(
                f"{path}; it leads outside its folder, to {shard!r}; "
                "do not use this checkpoint."
            )
    return shard_of


def _header(path: pathlib.Path) -> dict[str, Stored]:
    """Returns the tensors of one file, which must fill it without a gap."""
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
        header = _object(text)
        header.pop("__metadata__", None)
        tensors, offset = {}, 8 + length
        for name, entry in sorted(
            header.items(), key=lambda item: item[1]["data_offsets"]
        ):
            start, stop = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if not all(type(n) is int for n in (start, stop, *shape)):
                raise ValueError(f"tensor {name} has a place or shape of other numbers")
            dtype = (DTYPES | _OTHERS).get(entry["dtype"])
            if dtype is None:
                raise _format(path, name, entry["dtype"])
            if (
                start + 8 + length != offset
                or stop - start != nbytes(shape, dtype)
                or min(shape, default=1) < 0
            ):
                raise CheckpointError(
                    f"{path}; tensor {name} does not lie where its shape "
                    f"{list(shape)} puts it; fetch the file again."
                )
            tensors[name] = Stored(name, path, dtype, shape, offset)
            offset += stop - start
    except (ValueError, KeyError, TypeError, AttributeError) as err:
        raise CheckpointError(
            f"{path}; its header cannot be read: {err}; fetch it again."
        ) from err
    if offset != size:
        last = next(reversed(tensors), "none")
        raise CheckpointError(
            f"{path}; {size} bytes where its tensors (the last is {last}) end at "
            f"{offset}; it is cut off or damaged; fetch it again."
        )
    return tensors


def _format(path: pathlib.Path, name: str, kind: str) -> CheckpointError:
    return CheckpointError(
        f"{path}; tensor {name} holds {kind}; only {', '.join(DTYPES)} can be imported."
    )


def write_file(
    path: pathlib.Path,
    names: Iterable[str],
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
) -> None:
    """Writes one file of some tensors.

    Args:
      path: the file to be made.
      names: the tensors of this file, in their order.
      tensors: name -> shape and format.
      read: name -> the tensor.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        shape, dtype = tensors[name]
        stop = offset + nbytes(shape, dtype)
        header[name] = {
            "dtype": _NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            shape, dtype = tensors[name]
            tensor = read(name)
            assert (tensor.shape, tensor.dtype) == (shape, dtype), name
            # Not ndarray.tofile: its error on a full disk does not say "disk full".
            file.write(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)


def write(
    folder: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    read: Callable[[str], np.ndarray],
    *,
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes the tensors of a checkpoint folder, and reads each just before.

    Args:
      folder: where the files are made.
      tensors: name -> shape and format.
      read: name -> the tensor.
      shard_bytes: most bytes of tensors in a file; a larger tensor has its own file.
    """
    sizes = {name: nbytes(*kind) for name, kind in tensors.items()}
    shards = list(_shards(sizes, shard_bytes))
    if len(shards) == 1:
        write_file(folder / SINGLE, shards[0], tensors, read)
        return
    shard_of = {}
    for number, names in enumerate(shards, start=1):
        path = folder / f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_file(path, names, tensors, read)
        shard_of |= dict.fromkeys(names, path.name)
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": shard_of}
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
