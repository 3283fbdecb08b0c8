"""The mapping of a published family's settings, names and layouts to ours, and back.

A family declares each correspondence once; both directions are derived from it.
This module needs neither jax nor an array: tensors are planned by name, shape and view.
"""

import dataclasses
import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np
from einops import rearrange

from scaletrain.config import ModelConfig, applied, get, leaves
from scaletrain.errors import CheckpointError
from scaletrain.hf.families.normalise import shown
from scaletrain.matrices import DIMS

Config = Mapping[str, Any]  # a config.json, flattened to dotted keys
_REQUIRED = object()

# Keys of config.json that a forward pass ignores. A key that changes the arithmetic
# (pruned_heads, quantization_config), or may do so, must not be in this list.
HARMLESS = frozenset(
    # Of the file: who wrote it, from what, for whom.
    """
    _commit_hash _from_model_config _name_or_path architectures auto_map
    is_llama_config model_type tokenizer_class transformers.js_config
    transformers_version unsloth_fixed unsloth_version
    """.split()
    # Of tokens and lengths.
    + """
    bos_token_id decoder_start_token_id eos_token_id max_sequence_length
    model_max_length n_ctx pad_token_id sep_token_id unk_token_id
    """.split()
    # Of training and its heads for other tasks.
    + """
    _num_labels attention_dropout attention_probs_dropout_prob attn_pdrop
    classifier_dropout embd_pdrop embedding_dropout finetuning_task
    gradient_checkpointing hidden_dropout_prob id2label initializer_range label2id
    num_labels predict_special_tokens problem_type resid_pdrop task_specific_params
    """.split()
    # Of the way it is executed and stored.
    + """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal
    _flash_attn_2_enabled _pre_quantization_dtype attn_implementation
    cache_implementation chunk_size_feed_forward dtype keys_to_ignore_at_inference
    output_attentions output_hidden_states output_past output_scores pretraining_tp
    return_dict return_dict_in_generate tf_legacy_loss torch_dtype torchscript
    use_bfloat16 use_cache
    """.split()
    # Of encoders beside a decoder.
    + """
    cross_attention_hidden_size is_decoder is_encoder_decoder tie_encoder_decoder
    """.split()
    # Of generating, as older files repeat it.
    + """
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping
    encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences prefix
    remove_invalid_values repetition_penalty suppress_tokens temperature top_k top_p
    typical_p
    """.split()
)


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of config.json and the setting of `ModelConfig` that means the same.

    `absent` is the family's value where the key is missing: in the file's own terms, or
    a function of the file; `null` is the value of an explicit null, by default the
    same. `values` translates words, `to` and `fro` numbers.
    """

    key: str
    path: str
    absent: Any = _REQUIRED
    null: Any = _REQUIRED
    values: Mapping[Any, Any] | None = None
    to: Callable[[Any], Any] = lambda value: value
    fro: Callable[[Any], Any] = lambda value: value

    def read(self, config: Config) -> Any:
        """Returns our value; raises ValueError saying what is wrong with theirs."""
        value = config.get(self.key)
        if value is None and self.key in config and self.null is not _REQUIRED:
            value = self.null
        elif value is None:
            if self.absent is _REQUIRED:
                raise ValueError(f"{self.key}; missing; the model needs it.")
            value = _value(self.key, self.absent, config)
        if self.values is None:
            return self._number(value)
        for theirs, ours in self.values.items():
            if type(value) is type(theirs) and value == theirs:
                return ours
        known = ", ".join(map(repr, self.values))
        raise ValueError(f"{self.key}={shown(value)}; not supported; known: {known}.")

    def _number(self, value: Any) -> int | float:
        """Returns our number; raises ValueError where an integer loses a fraction."""
        kind = type(get(ModelConfig(), self.path))
        try:
            if isinstance(value, (bool, str)):
                raise TypeError
            ours = self.to(value)
            if kind is int and int(ours) != ours:
                raise ValueError
            return kind(ours)
        except (ValueError, TypeError, ArithmeticError) as err:
            kind_name = "a whole number" if kind is int else "a usable number"
            raise ValueError(
                f"{self.key}={shown(value)}; not {kind_name}; fetch config.json again."
            ) from err

    def write(self, value: Any) -> Any:
        """Returns their value; raises ValueError where they have none."""
        if self.values is None:
            theirs = self.fro(value)
            return None if theirs == self.null else theirs
        for theirs, ours in self.values.items():
            if ours == value:
                return theirs
        raise ValueError(f"model.{self.path}={value!r}")


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A published tensor and the parameters it holds.

    Args:
      name: with {l} for the layer.
      parts: (path of a parameter, einops pattern from theirs to ours), in the order
        in which they follow each other in dim `dim`. Letters are those of `_sizes`;
        the leading layer dim of a parameter is not in the pattern.
    """

    name: str
    parts: tuple[tuple[str, str], ...]
    dim: int = 0


@dataclasses.dataclass(frozen=True)
class Family:
    """All that is particular about one family of published checkpoints."""

    name: str
    model_types: tuple[str, ...]  # in config.json; the first is the one written
    architecture: str
    keys: tuple[Key, ...]
    tensors: tuple[Tensor, ...]
    # Setting -> its value in this family, or a function of the file.
    implied: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    # Key -> the values that this family's model supports.
    fixed: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    harmless: tuple[str, ...] = ()  # keys beside HARMLESS
    # Another prefix that names are published with -> the one in `tensors`.
    also: Mapping[str, str] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # patterns of tensors that have no parameter
    inputs_first: bool = False  # matrices are stored as (inputs, outputs)
    # The flat keys as the file spells them.
    write_config: Callable[[dict[str, Any]], dict[str, Any]] = dict

    def known_as(self, name: str) -> str:
        """Returns the name in `tensors` of a tensor that a file calls `name`."""
        for other, prefix in self.also.items():
            if name.startswith(other) and not name.startswith(prefix):
                return prefix + name.removeprefix(other)
        return name


def to_model(family: Family, config: Config) -> ModelConfig:
    """Returns the settings that the flat keys of a config.json describe.

    Raises:
      CheckpointError: with every key that is missing, unknown or not supported.
    """
    model, problems = ModelConfig(), list(_unknown(family, config))
    for key in family.keys:
        try:
            model = applied(model, {key.path: key.read(config)})
        except ValueError as err:
            problems.append(str(err))
    if not problems:
        try:
            for path, value in family.implied.items():
                ours = _value(f"model.{path}", value, config)
                model = applied(model, {path: ours})
        except ValueError as err:
            problems.append(str(err))
    if problems:
        lines = "\n".join(f"  {problem}" for problem in problems)
        raise CheckpointError(f"config.json cannot be honoured:\n{lines}")
    return model


def _value(name: str, value: Any, config: Config) -> Any:
    """Returns `value`, or its result for the file if it is a function."""
    if not callable(value):
        return value
    try:
        return value(config)
    except (KeyError, TypeError, ArithmeticError) as err:
        raise ValueError(f"{name}; it cannot be told from the other keys.") from err


def _unknown(family: Family, config: Config) -> Iterator[str]:
    """Yields a problem for each key of `config` that would be ignored."""
    read = {key.key for key in family.keys} | family.fixed.keys() | HARMLESS
    for name, value in config.items():
        if name in family.fixed:
            allowed = family.fixed[name]
            if value is not None and value not in allowed:
                known = " or ".join(map(repr, allowed))
                yield f"{name}={shown(value)}; not supported; known: {known}."
        # A key that is off or empty changes nothing.
        elif value and name not in read and name not in family.harmless:
            yield (
                f"{name}={shown(value)}; scaletrain does not know what it changes; "
                "remove it if it changes nothing."
            )


def to_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    """Returns the config.json of a model.

    Raises:
      ValueError: the family has no such model; the text names the settings.
    """
    config = {key.key: key.write(get(model, key.path)) for key in family.keys}
    config |= {name: allowed[0] for name, allowed in family.fixed.items()}
    read = to_model(family, config)
    differing = [
        f"model.{path}={value!r}"
        for path, value in _architecture(model)
        if get(read, path) != value
    ]
    if differing:
        raise ValueError(", ".join(differing))
    return {
        "architectures": [family.architecture],
        "model_type": family.model_types[0],
        **family.write_config(config),
    }


def _architecture(model: ModelConfig) -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of the settings that define a model's arithmetic."""
    for path, field, value in leaves(model):
        if field.metadata["exported"]:
            yield path, value


def _sizes(model: ModelConfig) -> dict[str, int]:
    """Returns the size of each letter of a pattern."""
    sizes = {dim.letter: getattr(model, setting) for setting, dim in DIMS.items()}
    return sizes | {"p": model.max_positions}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A parameter, or one layer of it, inside a published tensor."""

    path: str
    index: tuple[int, ...]  # into the leading dims of the parameter
    pattern: str
    sizes: Mapping[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape it is published with."""
        return tuple(self._size(group) for group in _groups(self.pattern)[0])

    def ours(self, theirs: np.ndarray) -> np.ndarray:
        """Returns a view of their array in our layout."""
        return rearrange(theirs, self.pattern, **self._used())

    def theirs(self, ours: np.ndarray) -> np.ndarray:
        """Returns a view of our array in their layout, or a copy if there is none."""
        left, _, right = self.pattern.partition(" -> ")
        return rearrange(ours, f"{right} -> {left}", **self._used())

    def _used(self) -> dict[str, int]:
        return {x: size for x, size in self.sizes.items() if x in self.pattern}

    def _size(self, letters: tuple[str, ...]) -> int:
        return int(np.prod([self.sizes[letter] for letter in letters]))


def _groups(pattern: str) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Returns the letters of each dim, theirs and ours: "(n h) d -> d n h"."""

    def side(text: str) -> list[tuple[str, ...]]:
        dims, group = [], None
        for word in text.replace("(", "( ").replace(")", " )").split():
            if word == "(":
                group = []
            elif word == ")":
                dims.append(tuple(group or ()))
                group = None
            elif group is None:
                dims.append((word,))
            else:
                group.append(word)
        return dims

    left, _, right = pattern.partition("->")
    return side(left), side(right)


@dataclasses.dataclass(frozen=True)
class Entry:
    """A published tensor of one model: its name, its shape and its parameters."""

    name: str
    pieces: tuple[Piece, ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the published tensor."""
        shapes = [piece.shape for piece in self.pieces]
        joined = list(shapes[0])
        joined[self.dim] = sum(shape[self.dim] for shape in shapes)
        return tuple(joined)

    def split(self, theirs: np.ndarray) -> Iterator[tuple[Piece, np.ndarray]]:
        """Yields each piece with its part of the tensor in our layout, as views."""
        start = 0
        for piece in self.pieces:
            size = piece.shape[self.dim]
            part = theirs[(slice(None),) * self.dim + (slice(start, start + size),)]
            yield piece, piece.ours(part)
            start += size

    def join(self, read: Callable[[Piece], np.ndarray]) -> np.ndarray:
        """Returns the tensor made of the parameters that `read` returns."""
        parts = [piece.theirs(read(piece)) for piece in self.pieces]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, self.dim)


def entries(
    family: Family, model: ModelConfig, paths: Collection[str]
) -> Iterator[Entry]:
    """Yields every published tensor of a model, layer by layer.

    Args:
      family: the model's family.
      model: the sizes of the model.
      paths: the parameters that the model has; a tensor of others is left out.
    """
    sizes, covered = _sizes(model), set()
    present = [t for t in family.tensors if t.parts[0][0] in paths]
    for layered, group in itertools.groupby(present, lambda t: "{l}" in t.name):
        group = list(group)
        for layer in range(model.num_layers if layered else 1):
            for tensor in group:
                index = (layer,) if layered else ()
                pieces = tuple(
                    Piece(path, index, pattern, sizes) for path, pattern in tensor.parts
                )
                covered.update(piece.path for piece in pieces)
                yield Entry(tensor.name.replace("{l}", str(layer)), pieces, tensor.dim)
    assert covered == set(paths), (family.name, covered ^ set(paths))
