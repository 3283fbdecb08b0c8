"""Rows of .jsonl, .json, .csv, .tsv and .parquet files, by name."""

import csv
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

from scaletrain.config.schema import DataConfig
from scaletrain.data.files import File, door, opened, refused
from scaletrain.errors import DataError


class Row(NamedTuple):
    """A line of JSON, an element of its array or a row of a table, and its name."""

    name: str
    fields: Any  # a dict, unless JSON holds something else


def rows(data: DataConfig, file: File, columns: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of `file`, in its order.

    Args:
      data: the settings, for errors.
      file: the file to read; its suffix decides the format.
      columns: names of the fields to read; a row may have others too.

    Raises:
      DataError: the file has not the format of its suffix, or has none of `columns`.
    """
    with opened(data, file) as content:
        if file.suffix == ".parquet":
            yield from _parquet(data, file.name, content, columns)
        elif file.suffix in (".csv", ".tsv"):
            delimiter = "," if file.suffix == ".csv" else "\t"
            yield from _csv(data, file.name, content, columns, delimiter)
        elif file.suffix == ".json":
            yield from _json(data, file.name, content)
        else:
            yield from _json_lines(data, file.name, content)


def no_field(data: DataConfig, where: str, fields: Any) -> DataError:
    """Returns the error of a row without the fields that the settings name.

    Args:
      data: the settings.
      where: the name of the row or of its file.
      fields: the names that it has.
    """
    if data.format == "chat":
        why = f"{where} has neither messages nor prompt and completion, only {fields}"
        return refused(data, why, "rename the columns, or set data.format=text")
    why = f"{where} has no field data.text_field={data.text_field!r}, only {fields}"
    return refused(data, why, "set data.text_field to the field that holds the text")


def _json_lines(data: DataConfig, name: str, lines: Iterable[bytes]) -> Iterator[Row]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{name}:{number}"
        try:
            yield Row(where, json.loads(line.decode("utf-8-sig")))
        except (ValueError, RecursionError) as err:
            remedy = "write one JSON object a line"
            if name.lower().endswith(".json"):
                remedy += ", or one array of objects"
            raise refused(data, f"{where} is not JSON: {err}", remedy) from err


def _json(data: DataConfig, name: str, file: BinaryIO) -> Iterator[Row]:
    """Yields the elements of an array or, if the file begins with none, its lines."""
    head = []
    for line in file:
        head.append(line)
        if line.strip(b"\xef\xbb\xbf \t\r\n"):
            break
    if not head or not head[-1].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(data, name, itertools.chain(head, file))
        return
    try:
        elements = json.loads((b"".join(head) + file.read()).decode("utf-8-sig"))
    except (ValueError, RecursionError) as err:
        remedy = "write one array of objects, or one object a line"
        raise refused(data, f"{name} is not JSON: {err}", remedy) from err
    for number, element in enumerate(elements, start=1):
        yield Row(f"{name}:{number}", element)


def _csv(
    data: DataConfig, name: str, file: BinaryIO, columns: Sequence[str], delimiter: str
) -> Iterator[Row]:
    """Yields the rows below the header, which are numbered from 1."""
    csv.field_size_limit(sys.maxsize)  # the default of 128 KiB is too short
    text = (line.decode("utf-8-sig") for line in file)
    remedy = "write it anew, or leave it out"
    with door(f"data.path={data.path!r}; {name} is not sound CSV", remedy):
        lines = csv.reader(text, delimiter=delimiter, strict=True)
        header = next(lines, [])
        if len(set(header)) < len(header):
            raise ValueError("two columns have one name")
        if not set(columns).intersection(header):
            raise no_field(data, name, header)
        number = 0
        for values in lines:
            if not values:  # an empty line
                continue
            number += 1
            if len(values) != len(header):
                why = f"row {number} has {len(values)} values for {len(header)} columns"
                raise ValueError(why)
            yield Row(f"{name}:{number}", dict(zip(header, values, strict=True)))


def _parquet(
    data: DataConfig, name: str, file: BinaryIO, columns: Sequence[str]
) -> Iterator[Row]:
    """Yields the rows with those of `columns` that the file has."""
    from pyarrow import parquet

    remedy = "write it anew, or leave it out"
    with door(f"data.path={data.path!r}; {name} is not sound Parquet", remedy):
        table = parquet.ParquetFile(file)
        if not set(columns).intersection(table.schema_arrow.names):
            raise no_field(data, name, table.schema_arrow.names)
        number = 0
        for batch in table.iter_batches(batch_size=1024, columns=list(columns)):
            for fields in batch.to_pylist(maps_as_pydicts="strict"):
                number += 1
                filled = {key: _unfilled(value) for key, value in fields.items()}
                yield Row(f"{name}:{number}", filled)


def _unfilled(value: Any) -> Any:
    """Returns `value` without the keys whose value is null.

    In Parquet all structs of a column have the same keys: a key of one row is null in
    the rows without it.
    """
    if isinstance(value, dict):
        return {k: _unfilled(v) for k, v in value.items() if v is not None}
    return [_unfilled(v) for v in value] if isinstance(value, list) else value
