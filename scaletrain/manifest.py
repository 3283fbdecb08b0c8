"""What a checkpoint consists of: its leaves and its files, with their checksums.

The manifest is written into a step's folder before the folder gets its name, so that
every step has one. It is compared with the files before anything of a step is used:
what a disk or a network changed since is named instead of trained on.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import zlib
from typing import Any

NAME = "manifest.json"
_BLOCK_BYTES = 2**24  # few files are large: their blocks are read side by side
_THREADS = min(16, 2 * (os.cpu_count() or 1))  # crc32 lets go of the interpreter
# Written by Orbax when it gives the folder its name, after the manifest.
_LATER = ("_CHECKPOINT_METADATA",)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step's folder holds."""

    config: str  # digest of the settings
    leaves: dict[str, dict[str, Any]]  # item -> path -> {"shape", "dtype"}
    files: dict[str, dict[str, Any]]  # path -> {"bytes", "crc32" of each block}

    @classmethod
    def of(
        cls, folder: pathlib.Path, config: str, leaves: dict[str, Any]
    ) -> "Manifest":
        """Returns the manifest of a folder as it is now."""
        files = {
            path: {"bytes": (folder / path).stat().st_size, "crc32": crc32}
            for path, crc32 in _sums(folder, _paths(folder)).items()
        }
        return cls(config, leaves, files)

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

    def write(self, folder: pathlib.Path) -> None:
        """Writes it into the folder, durably; its last line is its own checksum."""
        body = json.dumps(dataclasses.asdict(self), indent=1)
        with (folder / NAME).open("w", encoding="utf-8") as file:
            file.write(f"{body}\n{zlib.crc32(body.encode())}\n")
            file.flush()
            os.fsync(file.fileno())

    def damage(self, folder: pathlib.Path, part: int, parts: int) -> list[str]:
        """Returns what of every `parts`-th file is not as it was written."""
        mine, now = sorted(self.files)[part::parts], set(_paths(folder))
        found = [f"{path}: missing" for path in mine if path not in now]
        right = []
        for path in (path for path in mine if path in now):
            size, wanted = (folder / path).stat().st_size, self.files[path]["bytes"]
            if size == wanted:
                right.append(path)
            else:
                found.append(f"{path}: {size:,} bytes instead of {wanted:,}")
        for path, crc32 in _sums(folder, right).items():
            both = zip(crc32, self.files[path]["crc32"], strict=True)
            found += [
                f"{path}: its bytes have changed, from {i * _BLOCK_BYTES:,} on"
                for i, (is_now, was) in enumerate(both)
                if is_now != was
            ]
        return found


def damage(folder: pathlib.Path, part: int = 0, parts: int = 1) -> list[str]:
    """Returns what is wrong with a step's folder, nothing if it is as it was written.

    Of its files every `parts`-th is read, from `part` on.
    """
    try:
        return Manifest.read(folder).damage(folder, part, parts)
    except (OSError, ValueError, TypeError) as err:
        return [f"{NAME}: {err}"]


def _paths(folder: pathlib.Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in (NAME, *_LATER)
    )


def _sums(folder: pathlib.Path, paths: list[str]) -> dict[str, list[int]]:
    """Returns the checksum of each block of each file, read side by side."""
    blocks = [
        (path, start)
        for path in paths
        for start in range(0, (folder / path).stat().st_size, _BLOCK_BYTES)
    ]
    found: dict[str, list[int]] = {path: [] for path in paths}
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        sums = pool.map(lambda block: _crc32(folder / block[0], block[1]), blocks)
        for (path, _), crc32 in zip(blocks, sums, strict=True):
            found[path].append(crc32)
    return found


def _crc32(path: pathlib.Path, start: int) -> int:
    with path.open("rb") as file:
        file.seek(start)
        return zlib.crc32(file.read(_BLOCK_BYTES))
