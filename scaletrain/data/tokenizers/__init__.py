"""Tokenizers: text to ids and back, and the files that let a run carry its own.

reading      the tokenizer that the settings name, or that a run saved
byte         256 bytes, without a file
huggingface  tokenizer.json; also trained on the corpus (`train_bpe`)
piece        a SentencePiece .model file
beside       the files beside tokenizer.json: names, settings, a chat template
protocol     the methods of a tokenizer, and their shared functions
"""

from scaletrain.data.tokenizers.byte import ByteTokenizer
from scaletrain.data.tokenizers.huggingface import JsonTokenizer, train_bpe
from scaletrain.data.tokenizers.piece import PieceTokenizer
from scaletrain.data.tokenizers.protocol import END_OF_TEXT, Tokenizer
from scaletrain.data.tokenizers.reading import load_tokenizer, read_tokenizer

__all__ = [
    "END_OF_TEXT",
    "ByteTokenizer",
    "JsonTokenizer",
    "PieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "read_tokenizer",
    "train_bpe",
]
