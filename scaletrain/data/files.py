"""The files of `data.path`: each of them is read, or refused by its name."""

import contextlib
import pathlib
import re
import sys
import zipfile
from collections.abc import Iterator
from glob import has_magic
from typing import Any, BinaryIO, NamedTuple

from scaletrain.config.schema import DataConfig
from scaletrain.errors import DataError, ScaletrainError

ROWS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
# Suffixes of files that are one text each, beside those without any suffix.
_TEXT = frozenset(
    f".{suffix}"
    for suffix in (
        # prose and markup
        "txt text md markdown mdx rst adoc org tex bib html htm xhtml xml svg css scss "
        "less srt vtt eml po tokens raw log diff patch "
        # settings
        "toml yaml yml ini cfg conf properties env "
        # programs
        "py pyi pyx c h cc cpp cxx hh hpp hxx cu cuh m mm rs go java kt kts scala "
        "groovy gradle clj cljs cs fs fsx vb swift dart js mjs cjs jsx ts tsx vue "
        "svelte php rb pl pm lua r jl f f77 f90 f95 f03 f08 for pas ada adb ads d "
        "nim zig v sv vhd vhdl asm s ll hs lhs ml mli elm ex exs erl hrl lisp lsp "
        "el scm rkt lean thy agda sol proto thrift graphql sql sh bash zsh fish ps1 "
        "bat cmd awk tcl cmake mk make nix tf bzl wat glsl hlsl wgsl"
    ).split()
)
_COMPRESSED = (".gz", ".bz2", ".xz", ".lzma", ".zip", ".zst", ".lz4")
_TAR = (".tar", ".tgz", ".tbz", ".tbz2", ".txz", ".tzst")
_LEFT_OUT = "make it readable, or leave it out"


class File(NamedTuple):
    """A file of a corpus."""

    filesystem: Any
    path: str
    name: str  # below the folder of the glob

    @property
    def suffix(self) -> str:
        """Returns the suffix without that of the compression, in lower case."""
        return _suffix(self.name)

    @property
    def is_text(self) -> bool:
        """Returns whether the file is one text, and not rows."""
        return self.suffix not in ROWS


def refused(data: DataConfig, why: str, remedy: str) -> DataError:
    """Returns the error of a corpus that cannot be read as the settings say.

    Args:
      data: the settings.
      why: the reason, without a full stop.
      remedy: the action for the user, without a full stop.
    """
    return DataError(f"data.path={data.path!r}; {why}; {remedy}.")


@contextlib.contextmanager
def door(why: str, remedy: str) -> Iterator[None]:
    """A context that turns any error of a library into one line for the user.

    File systems, compressions and formats share no class of errors, so a list of those
    seen until now would miss the next one.

    Raises:
      DataError: `why`, the library's own words, `remedy`.
    """
    try:
        yield
    except (ScaletrainError, AssertionError):
        raise
    except Exception as err:
        words = " ".join(str(err).split()) or type(err).__name__
        raise DataError(f"{why}: {words}; {remedy}.") from err


def matching(data: DataConfig) -> list[File]:
    """Returns every file of `data.path`, sorted by path.

    Raises:
      DataError: no file matches, or one of them would not be read.
    """
    import fsspec

    remedy = "give a path or glob that fsspec can open from here"
    with door(f"data.path={data.path!r}; it cannot be listed", remedy):
        filesystem, pattern = fsspec.core.url_to_fs(data.path)
        if filesystem.isfile(pattern):
            paths = [pattern]
        else:
            paths = _listed(data, filesystem, pattern)
    if not paths:
        remedy = "give a path or glob that matches files, such as folder/**/*.txt"
        raise refused(data, "no file matches", remedy)
    root = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] + "/"
    matches = [File(filesystem, path, path.removeprefix(root)) for path in paths]
    _check_kinds(data, matches)
    return matches


def stamp(data: DataConfig, file: File) -> list[Any]:
    """Returns path, size and time of change: a list that changes with the content."""
    with door(f"data.path={data.path!r}; {file.path} cannot be read", _LEFT_OUT):
        info = file.filesystem.info(file.path)
        # Object stores have no time of change, but a checksum that costs nothing.
        changed = info.get("mtime") or file.filesystem.checksum(file.path)
        return [file.path, info["size"], changed]


@contextlib.contextmanager
def opened(data: DataConfig, file: File) -> Iterator[BinaryIO]:
    """Yields the content of `file` without its compression.

    Raises:
      DataError: the file cannot be read, now or inside the `with` block.
    """
    from fsspec.compression import compr
    from fsspec.utils import infer_compression

    with (
        door(f"data.path={data.path!r}; {file.path} cannot be read", _LEFT_OUT),
        file.filesystem.open(file.path, "rb") as raw,
    ):
        ending = pathlib.PurePosixPath(file.name).suffix.lower()
        kind = infer_compression(file.name)
        if ending == ".zip":
            content = _only_member(data, file, raw)
        elif ending == ".zst":
            content = _zstd(data, file, raw)
        elif ending in _COMPRESSED and kind is None:
            remedy = f"pip install {ending[1:]}, or unpack it"
            raise refused(data, f"nothing here unpacks {file.path}", remedy)
        else:
            unpacked: Any = compr  # typed in fsspec as if None were its only key
            content = unpacked[kind](raw, mode="rb")
        with content:
            yield content


def _suffix(name: str) -> str:
    path = pathlib.PurePosixPath(name)
    if path.suffix.lower() in _COMPRESSED:
        path = path.with_suffix("")
    return path.suffix.lower().removesuffix(".")


def _listed(data: DataConfig, filesystem: Any, pattern: str) -> list[str]:
    """Returns the paths of the files that `pattern` matches.

    Raises:
      DataError: a match is neither file nor folder, or a folder with unread content.
    """
    from fsspec.implementations.local import LocalFileSystem

    if isinstance(filesystem, LocalFileSystem):
        _list_folders(filesystem, pattern)
    matches: Any = filesystem.glob(pattern, detail=True)
    files, folders = [], []
    for path, info in matches.items():
        kind = info["type"]
        if kind not in (
            "file",
            "directory",
        ):  # a folder's listing has links as a type of their own
            with door(f"data.path={data.path!r}; {path} cannot be read", _LEFT_OUT):
                kind = filesystem.info(path)["type"]
        if kind not in ("file", "directory"):
            why = f"{path} is neither a file nor a folder"
            raise refused(data, why, "write its content to a file, or leave it out")
        (files if kind == "file" else folders).append(path.rstrip("/"))
    read_below = {p.rstrip("/").rpartition("/")[0] for p in matches}
    for folder in folders:
        if folder not in read_below and filesystem.ls(folder, detail=False):
            why = f"{folder} is a folder, and what is in it would not be read"
            remedy = (
                "name its files too, such as folder/**, or only files, such as "
                "folder/*.txt; a glob does not follow links to folders"
            )
            raise refused(data, why, remedy)
    return sorted(files)


def _list_folders(filesystem: Any, pattern: str) -> None:
    """Lists each folder that a glob looks into.

    A glob silently omits folders that may not be listed.

    Raises:
      OSError: a folder cannot be listed.
    """
    parts = pattern.split("/")
    for depth, part in enumerate(parts):
        if depth and has_magic(part):
            parents = ["/".join(parts[:depth]) + "/"]
            if part == "**":
                parents.append(parents[0] + "**/")
            for folder in {f for parent in parents for f in filesystem.glob(parent)}:
                filesystem.ls(folder, detail=False)
        if part == "**":
            return


def _check_kinds(data: DataConfig, matches: list[File]) -> None:
    """Refuses the files of unknown suffixes, all at once."""
    for file in matches:
        if file.suffix in _TAR:
            # The short suffixes, such as .tgz, are not all known to fsspec.
            raise _archive(data, file, "tar" if file.suffix == ".tar" else "")
    unknown = [f for f in matches if f.suffix not in {*ROWS, *_TEXT, ""}]
    if unknown:
        names = ", ".join(file.name for file in unknown[:5])
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        remedy = (
            "give texts a name or link that ends in .txt, convert rows to .jsonl, "
            ".json, .csv, .tsv or .parquet, or leave them out, such as with "
            "folder/**/*.txt"
        )
        why = f"the suffix of {names}{more} is not one of a text or of rows"
        raise refused(data, why, remedy)


def _archive(data: DataConfig, file: File, protocol: str = "") -> DataError:
    """Returns the error of an archive; fsspec's `protocol` could read its members."""
    remedy = "unpack it"
    if protocol:
        url = f"{protocol}://**::{file.filesystem.unstrip_protocol(file.path)}"
        remedy += f", or set data.path={url!r}"
    return refused(data, f"{file.path} is an archive of several files", remedy)


def _only_member(data: DataConfig, file: File, raw: BinaryIO) -> Any:
    archive = zipfile.ZipFile(raw)
    members = [each for each in archive.infolist() if not each.is_dir()]
    if len(members) > 1:
        raise _archive(data, file, "zip")
    if not members:
        raise refused(data, f"{file.path} is an empty archive", "leave it out")
    return archive.open(members[0])


def _zstd(data: DataConfig, file: File, raw: BinaryIO) -> Any:
    """Returns the content of all frames; other libraries silently stop after one."""
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd  # pyright: ignore[reportMissingImports]
    except ImportError as err:
        remedy = "pip install backports.zstd, or unpack it"
        raise refused(data, f"nothing here unpacks {file.path}", remedy) from err
    return zstd.ZstdFile(raw)
