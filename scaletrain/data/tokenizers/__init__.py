"""Tokenizers: text to ids and back, and the files that let a run carry its own.

reading           the tokenizer that settings name, or that a run left
bytes_          256 bytes, without a file
json_           tokenizer.json; also trained here (`train_bpe`)
sentencepiece_  a .model file
beside        the files beside tokenizer.json: names, settings, a chat template
protocol      the methods of each, and the parts that they share
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
