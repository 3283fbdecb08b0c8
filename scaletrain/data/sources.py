"""Documents: a corpus as a stream of named texts or rows, always in the same order.

Nothing here tokenises, shuffles or splits. A text that is empty is left out.
"""

import json
import pathlib
import platform
import re
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

from scaletrain.config.schema import DataConfig
from scaletrain.errors import DataError


class Document(NamedTuple):
    """A text, and the name its split is decided by."""

    name: str  # does not depend on where the corpus lies
    text: str


def documents(data: DataConfig) -> Iterator[Document]:
    """Yields the documents of `data.source`, in the same order every time.

    Raises:
      DataError: a corpus that is not there or not as the settings describe it.
    """
    readers = {"stdlib": _stdlib, "files": _files, "tfds": _tfds}
    return (found for found in readers[data.source](data) if found.text)


class Row(NamedTuple):
    """What a line of .jsonl or a row of Parquet holds, and its name."""

    name: str
    fields: dict[str, Any]


def rows(data: DataConfig) -> Iterator[Row]:
    """Yields the rows of the files of `data.path`, in the same order every time.

    Raises:
      DataError: a corpus that is not there or not as the settings describe it.
    """
    readers = {".jsonl": _json_rows, ".parquet": _parquet_rows}
    return _read(data, readers, _no_rows)


def identity(data: DataConfig) -> list[Any]:
    """Returns what tells this state of the corpus from any other, unread.

    Raises:
      DataError: a corpus that is not there.
    """
    if data.source == "stdlib":
        sizes = [(name, path.stat().st_size) for name, path in _modules()]
        return [platform.python_version(), sizes]
    if data.source == "files":
        return [_stamp(filesystem, path) for filesystem, _, path in _matches(data)]
    found = _data_source(data)
    info = found.dataset_info
    return [info.full_name, len(found), int(info.dataset_size)]


def _refused(data: DataConfig, why: str, remedy: str) -> DataError:
    return DataError(f"data.path={data.path!r}; {why}; {remedy}.")


def _modules() -> list[tuple[str, pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    foreign = {"site-packages", "dist-packages", "__pycache__"}
    paths = {path.relative_to(root): path for path in root.rglob("*.py")}
    return sorted(
        (name.as_posix(), path)
        for name, path in paths.items()
        if not foreign.intersection(name.parts)
    )


def _stdlib(data: DataConfig) -> Iterator[Document]:
    del data
    for name, path in _modules():
        try:
            yield Document(name, path.read_bytes().decode("utf-8"))
        except UnicodeDecodeError:
            # The library's tests hold a few files in other encodings, on purpose.
            continue


def _matches(data: DataConfig) -> list[tuple[Any, str, str]]:
    """Returns (file system, name, path) of every file of `data.path`, sorted."""
    import fsspec

    try:
        filesystem, pattern = fsspec.core.url_to_fs(data.path)
        if filesystem.isfile(pattern):
            paths = [pattern]
        else:
            found = filesystem.glob(pattern, detail=True)
            paths = sorted(p for p, info in found.items() if info["type"] == "file")
    except (OSError, ValueError, ImportError) as err:
        remedy = "give a path or glob that fsspec can open"
        raise _refused(data, f"it cannot be listed: {err}", remedy) from err
    if not paths:
        remedy = "give a path or glob that matches files, such as folder/**/*.txt"
        raise _refused(data, "no file matches", remedy)
    root = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0] + "/"
    return [(filesystem, path.removeprefix(root), path) for path in paths]


def _stamp(filesystem: Any, path: str) -> list[Any]:
    info = filesystem.info(path)
    # Object stores have no time of change, but a checksum that costs nothing.
    changed = info.get("mtime") or filesystem.checksum(path)
    return [path, info["size"], changed]


def _files(data: DataConfig) -> Iterator[Document]:
    readers = {".jsonl": _json_texts, ".parquet": _parquet_texts}
    return _read(data, readers, _text)


def _read(data: DataConfig, readers: Mapping[str, Callable], other: Callable) -> Any:
    """Yields what the reader of each file's suffix, or `other`, yields."""
    from fsspec.utils import infer_compression

    for filesystem, name, path in _matches(data):
        bare = name.rpartition(".")[0] if infer_compression(name) else name
        suffix = pathlib.PurePosixPath(bare).suffix.lower()
        if bare != name and suffix == ".json":
            suffix = ".jsonl"  # the usual name of a compressed file of lines
        reader = readers.get(suffix, other)
        try:
            with filesystem.open(path, "rb", compression="infer") as file:
                yield from reader(data, name, file)
        except (OSError, EOFError, zlib.error) as err:
            remedy = "make the file readable, or leave it out"
            raise _refused(data, f"{path} cannot be read: {err}", remedy) from err


def _text(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Document]:
    try:
        yield Document(name, file.read().decode("utf-8"))
    except UnicodeDecodeError as err:
        remedy = "convert it, or leave it out"
        raise _refused(data, f"{name} is not UTF-8: {err}", remedy) from err


def _no_rows(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Row]:
    del file
    remedy = "write the conversations as .jsonl or .parquet, or leave the file out"
    raise _refused(data, f"{name} has no rows", remedy)


def _json_lines(
    data: DataConfig, name: str, file: BinaryIO
) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            yield where, json.loads(line.decode("utf-8-sig"))
        except (ValueError, RecursionError) as err:
            remedy = "write one JSON object a line"
            raise _refused(data, f"{where} is not JSON: {err}", remedy) from err


def _json_texts(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Document]:
    for where, row in _json_lines(data, name, file):
        if not isinstance(row, dict) or data.text_field not in row:
            keys = sorted(row) if isinstance(row, dict) else type(row).__name__
            raise _no_field(data, where, keys)
        yield Document(where, _string(data, where, row[data.text_field]))


def _json_rows(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Row]:
    for where, row in _json_lines(data, name, file):
        if not isinstance(row, dict):
            why = f"{where} holds {type(row).__name__}, not an object"
            raise _refused(data, why, "write one JSON object a line")
        yield Row(where, row)


def _parquet_texts(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Document]:
    for where, row in _parquet(data, name, file, [data.text_field]):
        yield Document(where, _string(data, where, row[data.text_field]))


def _parquet_rows(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Row]:
    return _parquet(data, name, file, ["messages", "prompt", "completion"])


def _parquet(
    data: DataConfig, name: str, file: BinaryIO, columns: list[str]
) -> Iterator[Row]:
    """Yields the rows with those of `columns` that the file has."""
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(file)
        if not set(columns).intersection(table.schema_arrow.names):
            raise _no_field(data, name, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield Row(f"{name}:{number}", row)
    except (pyarrow.ArrowInvalid, UnicodeDecodeError) as err:
        remedy = "write it anew, or leave it out"
        raise _refused(data, f"{name} is not sound Parquet: {err}", remedy) from err


def _no_field(data: DataConfig, where: str, fields: Any) -> DataError:
    if data.format == "chat":
        why = f"{where} has neither messages nor prompt and completion, only {fields}"
        return _refused(data, why, "rename the columns, or set data.format=text")
    why = f"{where} has no field data.text_field={data.text_field!r}, only {fields}"
    return _refused(data, why, "set data.text_field to the field that holds the text")


def _string(data: DataConfig, where: str, value: Any) -> str:
    """Returns `value` if it is a text that UTF-8 can hold."""
    remedy = "set data.text_field to a field of texts, or repair that row"
    if not isinstance(value, str):
        why = f"{where} holds {type(value).__name__} in {data.text_field!r}, not a text"
        raise _refused(data, why, remedy)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        # JSON can spell half a surrogate pair; nothing after here could write it.
        raise _refused(data, f"{where} is not Unicode: {err}", remedy) from err
    return value


def _data_source(data: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    prepare = (
        "prepare it with tfds.builder(name, file_format='array_record')"
        ".download_and_prepare(), below the folder that TFDS_DATA_DIR names"
    )
    try:
        return tfds.data_source(data.path, split=data.split, download=False)
    except tfds.core.DatasetNotFoundError as err:
        why = "TFDS has no data set of this name, configuration and version"
        raise _refused(data, why, f"correct the name, or {prepare}") from err
    except (KeyError, AssertionError) as err:
        raise _refused(data, "it is not prepared", prepare) from err
    except (ValueError, NotImplementedError, ImportError) as err:
        why = f"data.split={data.split!r} cannot be read at random: {err}"
        raise _refused(data, why, f"correct the setting, or {prepare}") from err


def _tfds(data: DataConfig) -> Iterator[Document]:
    source = _data_source(data)
    for number in range(len(source)):
        where, row = f"{source.dataset_info.full_name}:{number}", source[number]
        if data.text_field not in row:
            raise _no_field(data, where, sorted(row))
        value = row[data.text_field]
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as err:
            remedy = "set data.text_field to a field of texts"
            raise _refused(data, f"{where} is not UTF-8: {err}", remedy) from err
        yield Document(where, _string(data, where, text))
