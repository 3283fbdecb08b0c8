"""The settings of the data."""

import dataclasses

from scaletrain.config.setting import free, setting, unless, when

_TEXT = when("data.source", "stdlib", "files", "tfds")


# Whether the tokens are still those of a run that is resumed is seen on the tokens
# themselves, see `checkpoint.Reader.agree`: the settings that lead to them may change.
@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = free(
        "stdlib",
        "Python's own source files (stdlib), files, a data set of TFDS, or random "
        "tokens (synthetic).",
        choices=("stdlib", "files", "tfds", "synthetic"),
    )
    path: str = free(
        "",
        "Path, glob or URL of the files; for tfds NAME[/CONFIG][:VERSION].",
        path="any",
        used_when=when("data.source", "files", "tfds"),
    )
    text_field: str = free(
        "text",
        "Column of JSON, CSV, Parquet or TFDS rows that holds the text.",
        used_when=(when("data.source", "files", "tfds"), when("data.format", "text")),
    )
    format: str = setting(
        "text",
        "Content of a row: a text, or the messages of a chat.",
        choices=("text", "chat"),
    )
    split: str = free(
        "train",
        "Split of the TFDS data set that is read.",
        used_when=when("data.source", "tfds"),
    )
    tokenizer: str = free(
        "bytes",
        "A token for each byte (bytes), one made from the text (bpe), or the path of "
        "a tokenizer.json or a .model file.",
        path="any",
        used_when=_TEXT,
    )
    end_of_text: str = free(
        "",
        "Spelling of the token of a tokenizer file that ends a document; '' = the one "
        "that the file names or a usual one.",
        used_when=(_TEXT, unless("data.tokenizer", "bytes", "bpe")),
    )
    validation_fraction: float = free(
        0.05,
        "Share of the documents that are evaluated and not trained on; 0 = none.",
        least=0.0,
        most=0.5,
        used_when=_TEXT,
    )
    cache_dir: str = free(
        "",
        "Folder of the tokens, for other runs on the same data; '' = the user's cache "
        "folder.",
        path="local",
        used_when=_TEXT,
    )
