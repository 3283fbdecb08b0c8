"""Documents: a corpus as a stream of named texts or rows, always in the same order.

This module does not tokenise, shuffle or split. Empty texts are left out.
"""

import pathlib
import platform
import sysconfig
from collections.abc import Iterator
from typing import Any, NamedTuple

from scaletrain.config.schema import DataConfig
from scaletrain.data import files, tables
from scaletrain.data.chats import FIELDS
from scaletrain.data.files import door, refused
from scaletrain.data.tables import Row, no_field


class Document(NamedTuple):
    """A text, and the name that decides its split."""

    name: str  # does not depend on the folder of the corpus
    text: str


def documents(data: DataConfig) -> Iterator[Document]:
    """Yields the documents of `data.source`, in the same order every time.

    Raises:
      DataError: a corpus that is not there or not as the settings describe it.
    """
    readers = {"stdlib": _stdlib, "files": _files, "tfds": _tfds}
    return (document for document in readers[data.source](data) if document.text)


def rows(data: DataConfig) -> Iterator[Row]:
    """Yields the rows of the files of `data.path`, in the same order every time.

    Raises:
      DataError: a corpus that is not there or not as the settings describe it.
    """
    for file in files.matching(data):
        if file.is_text:
            remedy = "write conversations as .jsonl or .parquet, or leave the file out"
            raise refused(data, f"{file.name} has no rows", remedy)
        for row in tables.rows(data, file, FIELDS):
            if not isinstance(row.fields, dict):
                why = f"{row.name} holds {type(row.fields).__name__}, not an object"
                raise refused(data, why, "write one JSON object a line")
            yield row


def identity(data: DataConfig) -> list[Any]:
    """Returns a fingerprint of the corpus's state, made without reading its texts.

    Raises:
      DataError: the corpus does not exist.
    """
    if data.source == "stdlib":
        sizes = [(name, path.stat().st_size) for name, path in _modules()]
        return [platform.python_version(), sizes]
    if data.source == "files":
        return [files.stamp(data, file) for file in files.matching(data)]
    source = _data_source(data)
    info = source.dataset_info
    return [info.full_name, len(source), int(info.dataset_size)]


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


def _files(data: DataConfig) -> Iterator[Document]:
    for file in files.matching(data):
        if file.is_text:
            yield Document(file.name, _text(data, file))
            continue
        for where, row in tables.rows(data, file, [data.text_field]):
            if not isinstance(row, dict) or data.text_field not in row:
                keys = sorted(row) if isinstance(row, dict) else type(row).__name__
                raise no_field(data, where, keys)
            yield Document(where, _string(data, where, row[data.text_field]))


def _text(data: DataConfig, file: files.File) -> str:
    remedy = "convert it, or leave it out"
    with files.opened(data, file) as content:
        try:
            text = content.read().decode("utf-8")
        except UnicodeDecodeError as err:
            raise refused(data, f"{file.name} is not UTF-8: {err}", remedy) from err
    if not file.suffix and "\0" in text:
        raise refused(data, f"{file.name} has no suffix and no text in it", remedy)
    return text


def _string(data: DataConfig, where: str, value: Any) -> str:
    """Returns `value` if it is a text that UTF-8 can hold."""
    remedy = "set data.text_field to a field of texts, or repair that row"
    if not isinstance(value, str):
        why = f"{where} holds {type(value).__name__} in {data.text_field!r}, not a text"
        raise refused(data, why, remedy)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as err:
        # JSON can spell half a surrogate pair; no later stage could write it.
        raise refused(data, f"{where} is not Unicode: {err}", remedy) from err
    return value


def _data_source(data: DataConfig) -> Any:
    import tensorflow_datasets as tfds

    prepare = (
        "prepare it with tfds.builder(name, file_format='array_record')"
        ".download_and_prepare(), below the folder that TFDS_DATA_DIR names"
    )
    with door(f"data.path={data.path!r}; it cannot be opened", prepare):
        try:
            return tfds.data_source(data.path, split=data.split, download=False)
        except tfds.core.DatasetNotFoundError as err:
            why = "TFDS has no data set of this name, configuration and version"
            raise refused(data, why, f"correct the name, or {prepare}") from err
        except (KeyError, AssertionError) as err:
            raise refused(data, "it is not prepared", prepare) from err
        except (ValueError, NotImplementedError, ImportError) as err:
            why = f"data.split={data.split!r} cannot be read at random: {err}"
            raise refused(data, why, f"correct the setting, or {prepare}") from err


def _tfds(data: DataConfig) -> Iterator[Document]:
    source = _data_source(data)
    for number in range(len(source)):
        where = f"{source.dataset_info.full_name}:{number}"
        with door(
            f"data.path={data.path!r}; {where} cannot be read", "prepare it anew"
        ):
            row = source[number]
        if data.text_field not in row:
            raise no_field(data, where, sorted(row))
        value = row[data.text_field]
        try:
            text = value.decode("utf-8") if isinstance(value, bytes) else value
        except UnicodeDecodeError as err:
            remedy = "set data.text_field to a field of texts"
            raise refused(data, f"{where} is not UTF-8: {err}", remedy) from err
        yield Document(where, _string(data, where, text))
