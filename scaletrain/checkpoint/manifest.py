"""What a checkpoint consists of: settings, leaves, and files with their checksums.

The manifest is written into a step's folder before the folder gets its name, so that
every step has one. Each process sums what it alone wrote, process 0 adds the rest. It
is compared with the files before anything of a step is used: what a disk or a network
changed since is named, with the leaves it hit, instead of trained on.
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
UNFINISHED = ".orbax-checkpoint-tmp"  # how the names of folders end that are not whole
_SUMS = ".sums"
_BLOCK_BYTES = 2**24  # few files are large: their blocks are read side by side
_THREADS = min(16, 2 * (os.cpu_count() or 1))  # crc32 lets go of the interpreter
_LEAVES = 8  # of a damage that are listed


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step's folder holds."""

    config: dict[str, Any]  # the settings
    data: dict[str, Any] | None  # where the data stands, None for an import
    leaves: dict[str, dict[str, Any]]  # item -> path -> {"shape", "dtype"}
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    # path -> {"bytes", "crc32" of each block}

    @classmethod
    def read(cls, folder: pathlib.Path) -> "Manifest":
        """Returns the manifest in a folder.

        Raises:
          OSError: there is none.
          ValueError: it is damaged.
        """
        text = (folder / NAME).read_text(encoding="utf-8")
        body, _, crc32 = text.rstrip("\n").rpartition("\n")
        if not crc32.isdigit() or int(crc32) != zlib.crc32(body.encode()):
            raise ValueError("its own checksum differs")
        return cls(**json.loads(body))

    def seal(self, folder: pathlib.Path) -> None:
        """Writes it, durably, into a folder that misses only its name.

        Its last line is its own checksum.
        """
        files: dict[str, Any] = {}
        for sums in sorted(folder.glob(f"*{_SUMS}")):
            files |= json.loads(sums.read_text(encoding="utf-8"))
            sums.unlink()
        # What lies in the folder itself is Orbax's, partly written later, and not read.
        rest = (p for p in folder.glob("*/**/*") if _name(folder, p) not in files)
        whole = dataclasses.replace(self, files=files | _sums(folder, rest))
        body = json.dumps(dataclasses.asdict(whole), indent=1)
        with (folder / NAME).open("w", encoding="utf-8") as file:
            file.write(f"{body}\n{zlib.crc32(body.encode())}\n")
            file.flush()
            os.fsync(file.fileno())

    def damage(self, folder: pathlib.Path, part: int, parts: int) -> list[str]:
        """Returns what of every `parts`-th file is not as it was written.

        Raises:
          OSError: a file cannot be read.
        """
        found, right = [], []
        for path in sorted(self.files)[part::parts]:
            size = self.files[path]["bytes"]
            if not (folder / path).exists():
                found.append((path, "missing", 0, size))
            elif (now := (folder / path).stat().st_size) != size:
                words = f"{now:,} bytes instead of {size:,}"
                found.append((path, words, min(now, size), size))
            else:
                right.append(path)
        for path, sums in _sums(folder, [folder / path for path in right]).items():
            both = zip(sums["crc32"], self.files[path]["crc32"], strict=True)
            for i, (is_now, was) in enumerate(both):
                start = i * _BLOCK_BYTES
                end = min(start + _BLOCK_BYTES, self.files[path]["bytes"])
                # Which of a block's bytes it is, its sum does not say.
                words = f"bytes between {start:,} and {end:,} have changed"
                if is_now != was:
                    found.append((path, words, start, end))
        items = {path.partition("/")[0] for path, *_ in found}
        places = {item: ocdbt.places(folder / item) for item in items}
        return [
            f"{path}: {words}{_of_leaves(places, path, start, end)}"
            for path, words, start, end in found
        ]


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> list[str]:
    """Returns what is wrong with a step's folder, nothing if it is as it was written.

    Of its files every `parts`-th is read, from `part` on.
    """
    try:
        manifest = Manifest.read(folder)
    except (OSError, ValueError, TypeError) as err:
        return [f"{NAME}: {err}"]
    try:
        return manifest.damage(folder, part, parts)
    except OSError as err:
        return [f"{err.filename}: {err.strerror}"]


def leave_sums(folder: pathlib.Path, process: int) -> None:
    """Writes the sums of what a process alone has written, for `Manifest.seal`.

    Orbax merges the indices of what the processes wrote, and leaves their files as they
    are.
    """
    sums = _sums(folder, folder.glob(f"*/ocdbt.process_{process}/**/*"))
    (folder / f"{process}{_SUMS}").write_text(json.dumps(sums), encoding="utf-8")


def _of_leaves(
    places: Mapping[str, list[ocdbt.Place]], path: str, start: int, end: int
) -> str:
    """Returns words for the leaves that have values between two bytes of a file."""
    item, _, file = path.partition("/")
    leaves = sorted(
        {
            place.leaf
            for place in places[item]
            if place.file == file and place.start < end and place.end > start
        }
    )
    more = ", ..." if leaves[_LEAVES:] else ""
    return f"; of {', '.join(leaves[:_LEAVES])}{more}" if leaves else ""


def _name(folder: pathlib.Path, path: pathlib.Path) -> str:
    """Returns the path that a file of a step will have once all have their names."""
    return path.relative_to(folder).as_posix().replace(UNFINISHED, "")


def _sums(
    folder: pathlib.Path, paths: Iterable[pathlib.Path]
) -> dict[str, dict[str, Any]]:
    """Returns size and checksums of files, whose blocks are read side by side."""
    sizes = {path: path.stat().st_size for path in sorted(paths) if path.is_file()}
    blocks = [
        (path, start)
        for path, size in sizes.items()
        for start in range(0, size, _BLOCK_BYTES)
    ]
    found = {
        _name(folder, path): {"bytes": size, "crc32": []}
        for path, size in sizes.items()
    }
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(_crc32, blocks)
        for (path, _), crc32 in zip(blocks, sums, strict=True):
            found[_name(folder, path)]["crc32"].append(crc32)
    return found


def _crc32(block: tuple[pathlib.Path, int]) -> int:
    path, start = block
    try:
        with path.open("rb") as file:
            file.seek(start)
            return zlib.crc32(file.read(_BLOCK_BYTES))
    except OSError as err:
        raise OSError(err.errno, err.strerror, str(path)) from err
