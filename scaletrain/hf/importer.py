"""Import: a published checkpoint becomes a run's settings, tokenizer and weights.

Tensors are read one at a time and copied straight into the shards of this machine's
devices, in their published formats, as step 0. The workdir appears when it is complete.
"""

import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaletrain import checkpoint, config, data, mesh
from scaletrain.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
)
from scaletrain.errors import CheckpointError, ConfigError
from scaletrain.files import check_room, creating
from scaletrain.hf import families, safetensors
from scaletrain.hf.families import Entry, Family
from scaletrain.hf.safetensors import Stored
from scaletrain.program import build
from scaletrain.workdir import Workdir

_GENERATION = "generation_config.json"
_SEQ_LEN = 2048  # of the settings an import leaves; training may set another
_HEAD = "*lm_head.weight"  # under any prefix
_CHUNK_BYTES = 2**26  # copied to a device at once


def import_checkpoint(
    source: str, workdir: str, overrides: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    """Returns the record of an import: a checkpoint folder as a workdir.

    Args:
      source: the folder of config.json and safetensors.
      workdir: the folder to be made.
      overrides: (setting, value) pairs over the settings that the import chooses.

    Args:
      source: folder with config.json and safetensors.
      workdir: folder that becomes the run.
      overrides: (dotted path, text) of settings.

    Raises:
      ScaletrainError: the checkpoint cannot be read as it is; nothing is left behind.
    """
    folder, target = pathlib.Path(source), pathlib.Path(workdir).absolute()
    _check_places(folder, target)
    description = safetensors.json_object(folder / "config.json")
    family, model = families.of_config(description)
    generation = _generation(folder, description)
    settings = _settings(folder, target, family, model, overrides)
    resolved = config.resolve(settings, jax.device_count())
    devices = mesh.build(resolved.mesh)
    shapes = checkpoint.flat(build(resolved, devices).state.params)
    entries = list(families.entries(family, model, shapes))
    stored = _matched(folder, family, model, entries)
    needed = sum(safetensors.nbytes(t.shape, t.dtype) for t in stored.values())
    check_room(f"--workdir={workdir}", target, needed)
    with creating(f"--workdir={workdir}", target, "importing") as partial:
        new = Workdir(partial)
        tokenizer = _tokenizer(folder, settings.data)
        if tokenizer is not None:
            tokenizer.save(new.tokenizer)
        _save_generation(generation, new.tokenizer)
        weights = _weights(entries, stored, shapes)
        with contextlib.closing(checkpoint.Store(new, settings)) as checkpoints:
            checkpoints.save_weights(weights)
        new.config.write_text(config.to_json(settings), encoding="utf-8")
    count = sum(math.prod(leaf.shape) for leaf in shapes.values())
    return {
        "family": family.name,
        "parameters": count,
        "tensors": len(entries),
        "workdir": str(target),
        "tokenizer": tokenizer is not None,
    }


def in_words(record: Mapping[str, Any]) -> str:
    """Returns the record of an import as a line for a person."""
    without = "" if record["tokenizer"] else ", without a tokenizer"
    return (
        f"{record['family']} of {record['parameters']:,} parameters "
        f"({record['tensors']} tensors){without} in {record['workdir']}"
    )


def _check_places(folder: pathlib.Path, target: pathlib.Path) -> None:
    if not folder.is_dir():
        raise ConfigError(
            [f"--from={folder}; no such folder; give the folder of a checkpoint."]
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(
            [f"--workdir={target}; it is not empty; give a folder to be made."]
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise ConfigError(
            [f"--workdir={target}; {err.strerror}; give a folder that can be made."]
        ) from err


def _tokenizer_file(folder: pathlib.Path) -> pathlib.Path | None:
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    return None


def _tokenizer(folder: pathlib.Path, settings: DataConfig) -> data.Tokenizer | None:
    path = _tokenizer_file(folder)
    if path is None:
        return None
    return data.read_tokenizer(dataclasses.replace(settings, tokenizer=str(path)))


def _generation(folder: pathlib.Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the checkpoint's settings of generation, special ids first."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {
        name: description[name] for name in names if description.get(name) is not None
    }
    path = folder / _GENERATION
    return ids | (safetensors.json_object(path) if path.is_file() else {})


def _save_generation(generation: Mapping[str, Any], folder: pathlib.Path) -> None:
    """Saves the settings of generation, which an export writes again."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(generation, indent=2) + "\n"
    (folder / _GENERATION).write_text(text, encoding="utf-8")


def _settings(
    folder: pathlib.Path,
    target: pathlib.Path,
    family: Family,
    model: ModelConfig,
    overrides: Sequence[tuple[str, str]],
) -> RunConfig:
    """Returns cautious settings to train on with, for any number of devices."""
    tokenizer = _tokenizer_file(folder)
    corpus = DataConfig(source="synthetic")
    if tokenizer is not None:
        corpus = DataConfig(tokenizer=str(Workdir(target).tokenizer / tokenizer.name))
    settings = RunConfig(
        batch_size=math.lcm(8, jax.device_count()),
        seq_len=min(model.max_positions or _SEQ_LEN, _SEQ_LEN),
        family=family.name,
        model=dataclasses.replace(model, remat="full"),
        mesh=MeshConfig(fsdp=-1),
        optim=OptimConfig(learning_rate=1e-5, warmup_steps=10),
        data=corpus,
    )
    return config.override(settings, overrides)


def _matched(
    folder: pathlib.Path, family: Family, model: ModelConfig, entries: list[Entry]
) -> dict[str, Stored]:
    """Returns the stored tensor of each entry, by the entry's name.

    Raises:
      CheckpointError: with every tensor that is missing, unknown or of another shape.
    """
    stored = safetensors.contents(folder)
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for tensor in stored.values():
        name = family.known_as(tensor.name)
        if name in tensors:
            problems.append(f"{tensor.name}: the same tensor as {tensors[name].name}")
        tensors[name] = tensor
    if model.head == "tied":
        _name_shared(entries, tensors)
    problems += _misfits(entries, tensors)
    expected = {entry.name for entry in entries}
    # A tied head may be stored twice; only the embedding is imported.
    left_out = family.left_out + ((_HEAD,) if model.head == "tied" else ())
    for name in tensors.keys() - expected:
        if not any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out):
            tensor = tensors[name]
            problems.append(f"{tensor.name} of {tensor.path.name}: not in this model")
    if not problems and model.head == "tied":
        problems += _untied(entries, tensors)
    if problems:
        shown = "\n".join(f"  {problem}" for problem in sorted(problems)[:20])
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(
            f"--from={folder}; its tensors are not those of a {family.name} with this "
            f"config.json:\n{shown}{more}\nfetch its files again."
        )
    return {name: tensors[name] for name in expected}


def _misfits(entries: list[Entry], tensors: Mapping[str, Stored]) -> Iterator[str]:
    """Yields each tensor that is missing or of another shape.

    Raises:
      CheckpointError: one whose format holds no weights.
    """
    for entry in entries:
        tensor = tensors.get(entry.name)
        if tensor is None:
            yield f"{entry.name}: missing"
            continue
        tensor.check_format()
        if tensor.shape != entry.shape:
            yield (
                f"{entry.name} of {tensor.path.name}: {list(tensor.shape)} where "
                f"config.json asks for {list(entry.shape)}"
            )


def _shared(entries: list[Entry]) -> str:
    """Returns the name of the embedding, to which an output head may be tied."""
    (name,) = (e.name for e in entries if e.pieces[0].path == "embedding")
    return name


def _name_shared(entries: list[Entry], tensors: dict[str, Stored]) -> None:
    """Renames a tied head that is stored without its embedding to the embedding."""
    heads = fnmatch.filter(tensors, _HEAD)
    if heads and _shared(entries) not in tensors:
        tensors[_shared(entries)] = tensors.pop(heads[0])


def _untied(entries: list[Entry], tensors: Mapping[str, Stored]) -> Iterator[str]:
    """Yields each stored head whose numbers differ from the embedding's."""
    shared = _shared(entries)
    for name in fnmatch.filter(tensors, _HEAD):
        if not np.array_equal(tensors[name].read(), tensors[shared].read()):
            yield (
                f"{name} of {tensors[name].path.name}: other numbers than {shared}, "
                "where config.json has tie_word_embeddings=true; is it false?"
            )


def _weights(
    entries: list[Entry], stored: Mapping[str, Stored], shapes: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """Returns every parameter, by path, filled tensor by tensor."""
    kinds: dict[str, set[np.dtype]] = {}
    for entry in entries:
        for piece in entry.pieces:
            kinds.setdefault(piece.path, set()).add(stored[entry.name].dtype)
    filling = {
        path: _Filling(shapes[path], jnp.result_type(*dtypes))
        for path, dtypes in kinds.items()
    }
    for entry in entries:
        theirs = stored[entry.name].read()
        for piece, ours in entry.split(theirs):
            filling[piece.path].put(piece.index, ours)
    return {path: each.array() for path, each in filling.items()}


class _Filling:
    """A sharded array that is filled slice by slice on its own devices."""

    def __init__(self, shape: jax.ShapeDtypeStruct, dtype: Any):
        self._shape, self._dtype = shape, dtype
        assert shape.sharding is not None
        indices = shape.sharding.addressable_devices_indices_map(shape.shape)
        self._places = {
            device: index for device, index in indices.items() if index is not None
        }
        inner = shape.sharding.shard_shape(shape.shape)
        self._shards = {
            device: jnp.zeros(inner, dtype, device=device) for device in self._places
        }

    def put(self, lead: tuple[int, ...], values: np.ndarray) -> None:
        """Copies `values` to the index `lead` of the leading dims."""
        for device, place in self._places.items():
            local = values[place[len(lead) :]]
            rows = max(1, _CHUNK_BYTES // max(1, local[:1].nbytes))
            for first in range(0, local.shape[0], rows):
                chunk = local[first : first + rows].astype(self._dtype)
                chunk = chunk[(None,) * len(lead)]
                start = (*lead, first, *(0,) * (values.ndim - 1))
                # The wait bounds the copies in flight to one chunk.
                self._shards[device] = jax.block_until_ready(
                    _laid(self._shards[device], jax.device_put(chunk, device), start)
                )

    def array(self) -> jax.Array:
        """Returns the filled array."""
        return jax.make_array_from_single_device_arrays(
            self._shape.shape, self._shape.sharding, list(self._shards.values())
        )


@functools.partial(jax.jit, donate_argnums=0)
def _laid(shard: jax.Array, chunk: jax.Array, start: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_update_slice(shard, chunk, start)
