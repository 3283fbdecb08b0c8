"""The path from a corpus to the batch of a step.

    files       the files that data.path names  (tables: their rows)
    sources     documents or rows, in an order that never changes
    tokenizers  text to ids and back  (chats: conversations)
    tokenise    documents to one token stream a split  (blocks: its files)
    cache       the streams, made once and kept  (counts: of their bytes)
    sequences   windows of a stream, by number  (packing: of conversations)
    batches     the rows of step s: a pure function of (seed, s)

The rest of scaletrain uses only the names that are imported below.
"""

from scaletrain.data.batches import (
    training_batches,
    training_documents,
    validation_batches,
)
from scaletrain.data.cache import Corpus, Split, baselines, prepare
from scaletrain.data.sequences import Sequences, sequences
from scaletrain.data.tokenizers import Tokenizer, load_tokenizer, read_tokenizer

__all__ = [
    "Corpus",
    "Sequences",
    "Split",
    "Tokenizer",
    "baselines",
    "load_tokenizer",
    "prepare",
    "read_tokenizer",
    "sequences",
    "training_batches",
    "training_documents",
    "validation_batches",
]
