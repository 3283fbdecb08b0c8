"""The corpus as tokens: made once, kept in a folder named by a hash of its settings.

A folder holds, for each split, `<split>.array_record` (see `blocks`) and either
`<split>.npz` (see `counts`) or, of conversations, two `<split>.*.npy` (see `packing`);
the tokenizer if it was trained here; and `index.json`, written last. The folder
gets its name only when it is complete.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable
from typing import Any

from scaletrain import paths
from scaletrain.config.schema import RunConfig
from scaletrain.data import sources, tokenizers
from scaletrain.data.blocks import Stream
from scaletrain.data.counts import ByteCounts, bits_per_byte
from scaletrain.data.tokenise import tokenise
from scaletrain.data.tokenizers import Tokenizer
from scaletrain.errors import DataError

FORMAT = 3  # of the folder; raise it when the same settings give other content
_DEAD_AFTER_S = 24 * 3600  # since a builder's last sign of life


@dataclasses.dataclass(frozen=True)
class Split:
    """One token stream, and the size of the text that it was made of."""

    path: pathlib.Path  # of its blocks
    dtype: str
    end_id: int
    num_tokens: int  # 0 for a validation split that was not asked for
    num_bytes: int  # of the documents in UTF-8; 0 for conversations
    num_documents: int  # or conversations


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams, and the tokenizer they came from."""

    tokenizer: Tokenizer | None  # None when data.source is "synthetic"
    fingerprint: str  # of the tokens in their order and of the tokenizer
    splits: dict[str, Split]  # "train" and "validation"; none when "synthetic"


def prepare(
    run: RunConfig, say: Callable[[str], None], tokenizer: Tokenizer | None = None
) -> Corpus:
    """Returns the corpus of `run`, tokenised now if no cache has it.

    Any number of processes may prepare the same corpus at once.

    Args:
      run: the settings.
      say: prints a line of progress for the user.
      tokenizer: that of the checkpoint that reads the corpus; it may have tokens for
        which the model has no row, as long as no document has them. None = the
        tokenizer that the settings name.

    Raises:
      DataError: a corpus or tokenizer that cannot be read as asked.
    """
    data, vocab_size = run.data, run.model.vocab_size
    if data.source == "synthetic":
        return Corpus(None, _sha256(["synthetic", vocab_size]), {})
    if corpus := _with_trained_tokenizer(run, tokenizer, say):
        return corpus
    given, tokenizer = tokenizer, tokenizer or tokenizers.read_tokenizer(data)
    if given is None and tokenizer is not None and tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"model.vocab_size={vocab_size}; the tokenizer has {tokenizer.vocab_size} "
            f"ids; set model.vocab_size to at least {tokenizer.vocab_size}."
        )
    folder = _folder(run, tokenizer)
    _sweep(folder.parent)
    if corpus := _complete(folder, tokenizer, say):
        return corpus
    partial = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
    try:
        partial.mkdir(parents=True)
    except OSError as err:
        raise DataError(
            f"data.cache_dir={data.cache_dir!r}; no folder can be made in it: {err}; "
            "set it to a local folder you may write to."
        ) from err
    try:
        _seal(partial, tokenise(run, tokenizer, partial, say))
        _install(partial, folder, lambda: _complete(folder, tokenizer, say) is not None)
    except OSError as err:
        raise DataError(
            f"data.cache_dir={data.cache_dir!r}; {err.strerror or err} for the tokens "
            f"in {folder.parent}; make room, or set it to a folder on another disk."
        ) from err
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return _open(folder, tokenizer)


def _with_trained_tokenizer(
    run: RunConfig, tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> Corpus | None:
    """Returns the corpus on which `tokenizer` was trained, if the cache has it.

    Its folder has another name than the tokens of a tokenizer that was given.
    """
    if tokenizer is None or run.data.tokenizer != "bpe":
        return None
    corpus = _complete(_folder(run, None), None, say)
    if corpus is None or corpus.tokenizer is None:
        return None
    return corpus if corpus.tokenizer.fingerprint == tokenizer.fingerprint else None


def baselines(corpus: Corpus, split: Split) -> dict[str, float]:
    """Returns bits per byte of a split under models that count the training bytes.

    See `counts.bits_per_byte`; empty for a split without bytes, as of conversations.

    Raises:
      DataError: the cache is damaged.
    """
    if split.num_bytes == 0:
        return {}
    paths = [each.path.with_suffix(".npz") for each in (corpus.splits["train"], split)]
    return bits_per_byte(*map(ByteCounts.load, paths))


def _folder(run: RunConfig, tokenizer: Tokenizer | None) -> pathlib.Path:
    """Returns the folder for the tokens of these settings and this corpus."""
    data = run.data
    made_by: Any = ["bpe", run.model.vocab_size]
    if tokenizer is not None:
        made_by = tokenizer.fingerprint
        if tokenizer.vocab_size > run.model.vocab_size:  # another model refuses others
            made_by = [made_by, run.model.vocab_size]
    key = _sha256(
        [
            FORMAT,
            [data.source, data.path, data.format, data.text_field, data.split],
            data.validation_fraction,
            made_by,
            sources.identity(data),
        ]
    )
    return pathlib.Path(data.cache_dir or _users_cache()) / key[:32]


def _users_cache() -> str:
    """Returns the user's cache folder.

    Raises:
      DataError: the user has no home.
    """
    home = paths.expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if home.startswith("~"):
        raise DataError(
            "data.cache_dir=''; this user has no home folder to keep tokens in; "
            "set it to a folder, or set XDG_CACHE_HOME."
        )
    return f"{home}/scaletrain"


def _sha256(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _seal(folder: pathlib.Path, summary: dict[str, Any]) -> None:
    """Writes the index: `tokenise`'s summary, the size of each file, and a checksum."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    index = summary | {"files": sizes}
    content = json.dumps({"index": index, "sha256": _sha256(index)}, indent=1)
    (folder / "index.json").write_text(content, encoding="utf-8")


def _index(folder: pathlib.Path) -> dict[str, Any]:
    text = (folder / "index.json").read_text(encoding="utf-8", errors="replace")
    try:
        sealed = json.loads(text)
        index = sealed["index"]
        if sealed["sha256"] != _sha256(index):
            raise ValueError("its checksum is another")
    except (ValueError, KeyError, TypeError) as err:
        why = f"its index.json is damaged: {err}"
        raise DataError(f"{folder}; {why}; delete the folder.") from err
    return index


def _open(folder: pathlib.Path, tokenizer: Tokenizer | None) -> Corpus:
    """Returns the corpus in `folder`.

    Raises:
      FileNotFoundError: there is none.
      DataError: it is damaged.
    """
    index = _index(folder)
    for name, size in index["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise DataError(f"{path}; not {size} bytes any more; delete {folder}.")
    tokenizer = tokenizer or tokenizers.load_tokenizer(folder / "tokenizer")
    if tokenizer.fingerprint != index["tokenizer"]:
        raise DataError(f"{folder}; its tokenizer is damaged; delete the folder.")
    splits = {}
    for name, counts in index["splits"].items():
        path = folder / f"{name}.array_record"
        splits[name] = Split(path, index["dtype"], tokenizer.end_id, **counts)
        Stream(path, splits[name].num_tokens, index["dtype"])  # raises if it is damaged
    return Corpus(tokenizer, index["fingerprint"], splits)


def _complete(
    folder: pathlib.Path, tokenizer: Tokenizer | None, say: Callable[[str], None]
) -> Corpus | None:
    """Returns the corpus in `folder`, None if it is missing or damaged."""
    try:
        return _open(folder, tokenizer)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except DataError as err:
        say(f"{err} Making it anew.")
        return None


def _install(
    partial: pathlib.Path, folder: pathlib.Path, installed: Callable[[], bool]
) -> None:
    """Gives a complete folder its name, unless another builder was faster."""
    while True:
        try:
            partial.rename(folder)
            return
        except OSError as err:
            if err.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        if installed():
            return
        # The folder of that name is damaged. It moves aside in one step, so that no
        # other builder ever sees half of it.
        aside = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.partial"
        with contextlib.suppress(FileNotFoundError):
            folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def _sweep(root: pathlib.Path) -> None:
    """Removes the partial folders of builders that died long ago."""
    for folder in root.glob(".*.partial"):
        with contextlib.suppress(FileNotFoundError):  # its builder has just finished
            signs = [folder.stat().st_mtime]
            signs += [path.stat().st_mtime for path in folder.rglob("*")]
            if time.time() - max(signs) > _DEAD_AFTER_S:
                shutil.rmtree(folder, ignore_errors=True)
