"""The manifest of a checkpoint: its settings, leaves, and files with their checksums.

The manifest is written into a step's folder before the folder gets its name, so that
every step has one. Each process computes the checksums of the files that it alone
wrote; process 0 adds those of the other files. The manifest is compared with the files
before a step is used: bytes that a disk or a network has changed are reported, with the
leaves they belong to, and the run does not train on them.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from scaletrain.checkpoint import ocdbt

NAME = "manifest.json"
UNFINISHED = ".orbax-checkpoint-tmp"  # the end of an incomplete folder's name
_SUMS = ".sums"
_BLOCK_BYTES = 2**24  # few files are large: their blocks are read in parallel
_THREADS = min(16, 2 * (os.cpu_count() or 1))  # zlib.crc32 releases the GIL
_LISTED_LEAVES = 8  # of a damaged range, in an error


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The contents of a step's folder."""

    config: dict[str, Any]  # the settings
    data: dict[str, Any] | None  # the position in the data, None for an import
    leaves: dict[str, dict[str, Any]]  # item -> path -> {"shape", "dtype"}
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # path -> {"bytes", "crc32" of each block}

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """Returns the manifest in a folder.

        Raises:
          OSError: the folder has no manifest.
          ValueError: the manifest is damaged.
        """
        text = (folder / NAME).read_text(encoding="utf-8")
        body, _, crc32 = text.rstrip("\n").rpartition("\n")
        if not crc32.isdigit() or int(crc32) != zlib.crc32(body.encode()):
            raise ValueError("its own checksum differs")
        return cls(**json.loads(body))

    def seal(self, folder: pathlib.Path) -> None:
        """Writes the manifest, durably, into a folder that lacks only its final name.

        The last line of the file is the checksum of the lines before it.
        """
        files: dict[str, Any] = {}
        for sums in sorted(folder.glob(f"*{_SUMS}")):
            files |= json.loads(sums.read_text(encoding="utf-8"))
            sums.unlink()
        # Files directly in the folder are Orbax's own: some are written after this, and
        # no restore reads them.
        others = (p for p in folder.glob("*/**/*") if _name(folder, p) not in files)
        complete = dataclasses.replace(self, files=files | _sums(folder, others))
        body = json.dumps(dataclasses.asdict(complete), indent=1)
        with (folder / NAME).open("w", encoding="utf-8") as file:
            file.write(f"{body}\n{zlib.crc32(body.encode())}\n")
            file.flush()
            os.fsync(file.fileno())

    def damage(
        self, folder: pathlib.Path, process: int, num_processes: int
    ) -> list[str]:
        """Returns a line for each difference between files and manifest.

        Args:
          process: the first file that is read, in the order of names.
          num_processes: the distance to the next file: each process reads its own.

        Raises:
          OSError: a file cannot be read.
        """
        damages, complete = [], []
        for path in sorted(self.files)[process::num_processes]:
            size = self.files[path]["bytes"]
            if not (folder / path).exists():
                damages.append((path, "missing", 0, size))
            elif (actual := (folder / path).stat().st_size) != size:
                message = f"{actual:,} bytes instead of {size:,}"
                damages.append((path, message, min(actual, size), size))
            else:
                complete.append(path)
        for path, sums in _sums(folder, [folder / path for path in complete]).items():
            pairs = zip(sums["crc32"], self.files[path]["crc32"], strict=True)
            for i, (computed, stored) in enumerate(pairs):
                start = i * _BLOCK_BYTES
                end = min(start + _BLOCK_BYTES, self.files[path]["bytes"])
                # A checksum covers a block; it does not say which byte has changed.
                message = f"bytes between {start:,} and {end:,} have changed"
                if computed != stored:
                    damages.append((path, message, start, end))
        items = {path.partition("/")[0] for path, *_ in damages}
        places = {item: ocdbt.places(folder / item) for item in items}
        return [
            f"{path}: {message}{_leaves_of(places, path, start, end)}"
            for path, message, start, end in damages
        ]


def damage(folder: pathlib.Path, process: int = 0, num_processes: int = 1) -> list[str]:
    """Returns the damages of a step's folder, a line each; an intact one has none.

    Args:
      folder: a complete step.
      process: the process that asks, see `Manifest.damage`.
      num_processes: the processes that share the files.
    """
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError, TypeError) as err:
        return [f"{NAME}: {err}"]
    try:
        return manifest.damage(folder, process, num_processes)
    except OSError as err:
        return [f"{err.filename}: {err.strerror}"]


def leave_sums(folder: pathlib.Path, process: int) -> None:
    """Writes the checksums of the files of one process, for `Manifest.seal`.

    They stay true: Orbax merges the processes' indices, but does not touch their files.
    """
    sums = _sums(folder, folder.glob(f"*/ocdbt.process_{process}/**/*"))
    (folder / f"{process}{_SUMS}").write_text(json.dumps(sums), encoding="utf-8")


def _leaves_of(
    places: Mapping[str, list[ocdbt.Place]], path: str, start: int, end: int
) -> str:
    """Returns the end of a message: the leaves with values between two bytes."""
    item, _, file = path.partition("/")
    leaves = sorted(
        {
            place.leaf
            for place in places[item]
            if place.file == file and place.start < end and place.end > start
        }
    )
    dots = ", ..." if leaves[_LISTED_LEAVES:] else ""
    return f"; of {', '.join(leaves[:_LISTED_LEAVES])}{dots}" if leaves else ""


def _name(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Returns the path of a file within its step, as it is once folders are renamed."""
    return path.relative_to(folder).as_posix().replace(UNFINISHED, "")


def _sums(
    folder: pathlib.Path, paths: Iterable[pathlib.Path]
) -> dict[str, dict[str, Any]]:
    """Returns size and checksums of files by name; blocks are read in parallel."""
    sizes = {path: path.stat().st_size for path in sorted(paths) if path.is_file()}
    blocks = [
        (path, start)
        for path, size in sizes.items()
        for start in range(0, size, _BLOCK_BYTES)
    ]
    files = {
        _name(folder, path): {"bytes": size, "crc32": []}
        for path, size in sizes.items()
    }
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_crc32, blocks)
        for (path, _), crc32 in zip(blocks, sums, strict=True):
            files[_name(folder, path)]["crc32"].append(crc32)
    return files


def _crc32(block: tuple[pathlib.Path, int]) -> int:
    path, start = block
    try:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(_BLOCK_BYTES))
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
