"""Tokenizers from the settings, and from the folder of a run."""

import json
import pathlib

from scaletrain.config.schema import DataConfig
from scaletrain.data.files import door
from scaletrain.data.tokenizers import beside
from scaletrain.data.tokenizers.byte import ByteTokenizer
from scaletrain.data.tokenizers.huggingface import JsonTokenizer
from scaletrain.data.tokenizers.piece import PieceTokenizer
from scaletrain.data.tokenizers.protocol import Tokenizer
from scaletrain.errors import DataError


def read_tokenizer(data: DataConfig) -> Tokenizer | None:
    """Returns the tokenizer that `data` names, None for one yet to be trained.

    Raises:
      DataError: a tokenizer file that cannot be read, or has no end-of-text token.
    """
    import fsspec

    if data.tokenizer == "bpe":
        return None
    if data.tokenizer == "bytes":
        return ByteTokenizer()
    remedy = "give bytes, bpe, or the path of a tokenizer.json or of a .model file"
    with door(f"data.tokenizer={data.tokenizer!r}; it cannot be read", remedy):
        filesystem, path = fsspec.core.url_to_fs(data.tokenizer)
        content = filesystem.cat_file(path)
        if data.tokenizer.endswith(".model"):
            return PieceTokenizer(content, data.end_of_text)
        files = beside.read(filesystem, path)
        return JsonTokenizer(content.decode("utf-8"), data.end_of_text, files)


def load_tokenizer(folder: pathlib.Path) -> Tokenizer:
    """Returns the tokenizer that was saved in `folder`.

    Raises:
      DataError: the folder has no tokenizer, or not all of its files.
    """
    try:
        about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
        if about["kind"] == "bytes":
            return ByteTokenizer()
        if about["kind"] == "model":
            content = (folder / "tokenizer.model").read_bytes()
            return PieceTokenizer(content, about["end_of_text"])
        text = (folder / "tokenizer.json").read_bytes().decode("utf-8")
        paths = {name: folder / name for name in beside.NAMES}
        files = {n: path.read_bytes() for n, path in paths.items() if path.is_file()}
        return JsonTokenizer(text, about["end_of_text"], files)
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise DataError(
            f"{folder}; no tokenizer can be read there: {err}; give the folder of a "
            "run that was started on text."
        ) from err
