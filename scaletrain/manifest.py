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
_CHUNK_BYTES = 2**24
_THREADS = min(16, 2 * (os.cpu_count() or 1))  # crc32 lets go of the interpreter
# Written by Orbax when it gives the folder its name, after the manifest.
_LATER = ("_CHECKPOINT_METADATA",)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a step's folder holds."""

    config: str  # digest of the settings
    leaves: dict[str, dict[str, Any]]  # item -> path -> {"shape", "dtype"}
    files: dict[str, dict[str, int]]  # path in the folder -> {"bytes", "crc32"}

    @classmethod
    def of(
        cls, folder: pathlib.Path, config: str, leaves: dict[str, Any]
    ) -> "Manifest":
        """Returns the manifest of a folder as it is now."""
        paths = _paths(folder)
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            sums = pool.map(_crc32, [folder / path for path in paths])
            files = {
                path: {"bytes": (folder / path).stat().st_size, "crc32": crc32}
                for path, crc32 in zip(paths, sums, strict=True)
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
        with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
            sums = pool.map(_crc32, [folder / path for path in right])
            for path, crc32 in zip(right, sums, strict=True):
                if crc32 != self.files[path]["crc32"]:
                    found.append(f"{path}: its bytes have changed")
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


def _crc32(path: pathlib.Path) -> int:
    crc32 = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            crc32 = zlib.crc32(chunk, crc32)
    return crc32
