"""Export: a run becomes a published checkpoint that other programs load.

Everything is written under a temporary name and moved when it is complete.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from scaletrain import checkpoint, config, data, mesh
from scaletrain.checkpoint import warm_start
from scaletrain.config import PrecisionConfig, RunConfig
from scaletrain.errors import CheckpointError, ConfigError
from scaletrain.files import creating
from scaletrain.hf import families, peft, safetensors
from scaletrain.hf.families import Entry, Family, Piece
from scaletrain.program import build
from scaletrain.workdir import Workdir

Tensors = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and format
DTYPES = {
    "float32": safetensors.DTYPES["F32"],
    "float16": safetensors.DTYPES["F16"],
    "bfloat16": safetensors.DTYPES["BF16"],
}


def export_checkpoint(
    run: RunConfig, workdir: str, to: str, step: int | None, dtype: str, *, merge: bool
) -> dict[str, Any]:
    """Returns the record of an export: one checkpoint of a run as a folder.

    Args:
      run: the settings of the run in `workdir`.
      to: the folder to be made.
      step: the step of the checkpoint; None = the newest.
      dtype: the format of the tensors; "" = as they are stored.
      merge: add the adapters to the weights that they adapt; without, the adapters
        are exported alone.

    Raises:
      ScaletrainError: no such checkpoint, a model that no published family has, or a
        folder that cannot be written.
    """
    target = pathlib.Path(to).absolute()
    _check(run, target, merge=merge)
    # float32 keeps every stored format exact; precision settings, which may keep the
    # weights beside adapters in fewer bits, would round them.
    run = dataclasses.replace(run, precision=PrecisionConfig(compute="float32"))
    run = config.resolve(run, jax.device_count())
    model = run.model
    if not model.max_positions:
        model = dataclasses.replace(model, max_positions=run.seq_len)
    family, settings = families.of_model(run.family, model)
    devices = mesh.build(run.mesh)
    program = build(run, devices)
    tokenizer = warm_start.tokenizer_of(workdir, run)
    checkpoints, step = checkpoint.reading(workdir, run, step)
    with jax.set_mesh(devices):
        stored = checkpoints.dtypes(step)
        weights = warm_start.weights_in(checkpoints, step, program.state)
    weights = checkpoint.flat(weights)
    source = Workdir.of(workdir)
    with creating(f"--to={to}", target, "exporting") as partial:
        if run.lora.rank and not merge:
            tensors = _adapter(partial, family, run, weights, dtype)
        else:
            tensors = _model(partial, family, run, weights, stored, dtype)
            imported = source.tokenizer / "generation_config.json"
            _describe(partial, settings, tensors, tokenizer, imported)
        _card(partial, run, family, source, step, tensors)
    return {"family": family.name, "step": step, "tensors": len(tensors), "to": to}


def in_words(record: Mapping[str, Any]) -> str:
    """Returns the record of an export as a line for a person."""
    return (
        f"step {record['step']} as {record['family']} "
        f"({record['tensors']} tensors) in {record['to']}"
    )


def _check(run: RunConfig, target: pathlib.Path, *, merge: bool) -> None:
    problems = []
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        problems.append(f"--to={target}; it is not empty; give a folder to be made.")
    if merge and not run.lora.rank:
        problems.append("--merge; the run has no adapters; leave it out.")
    if problems:
        raise ConfigError(problems)


def _model(
    folder: pathlib.Path,
    family: Family,
    run: RunConfig,
    weights: Mapping[str, jax.Array],
    stored: Mapping[str, np.dtype],
    dtype: str,
) -> Tensors:
    """Writes the model's tensors, with adapters added to their matrices."""
    plain = [path for path in weights if "/lora_" not in path]
    entries = {
        entry.name: entry for entry in families.entries(family, run.model, plain)
    }

    def kind(entry: Entry) -> np.dtype:
        default = stored.get(entry.pieces[0].path, DTYPES["float32"])
        return DTYPES[dtype] if dtype else default

    def layer(piece: Piece) -> np.ndarray:
        weight = np.asarray(jax.device_get(weights[piece.path][piece.index]))
        stem = piece.path.removesuffix("weight")
        if f"{stem}lora_a" in weights:
            a, b = (
                np.asarray(jax.device_get(weights[f"{stem}lora_{x}"][piece.index]))
                for x in "ab"
            )
            scale = run.lora.alpha / run.lora.rank
            weight = weight + scale * np.tensordot(a, b, axes=1)
        return weight

    def read(name: str) -> np.ndarray:
        entry = entries[name]
        return _rounded(name, entry.join(layer), kind(entry))

    tensors = {name: (entry.shape, kind(entry)) for name, entry in entries.items()}
    safetensors.write(folder, tensors, read)
    return tensors


def _rounded(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Returns a tensor in another format.

    Raises:
      CheckpointError: a finite number would become infinite in the format.
    """
    with np.errstate(over="ignore"):
        rounded = tensor.astype(dtype)
    overflowed = np.isinf(rounded) & np.isfinite(tensor)
    if overflowed.any():
        largest = float(np.abs(tensor[overflowed].astype(np.float64)).max())
        most = {kind: float(ml_dtypes.finfo(kind).max) for kind in DTYPES.values()}
        wider = [str(kind) for kind, limit in most.items() if limit >= largest]
        raise CheckpointError(
            f"--dtype={dtype}; it goes up to {most[dtype]:.6g}, and {name} has "
            f"{largest:.6g}; give --dtype={' or '.join(wider)}."
        )
    return rounded


def _adapter(
    folder: pathlib.Path,
    family: Family,
    run: RunConfig,
    weights: Mapping[str, jax.Array],
    dtype: str,
) -> Tensors:
    """Writes adapters alone, in PEFT's layout."""
    plain = [path for path in weights if "/lora_" not in path]
    pieces = peft.tensors(families.entries(family, run.model, plain), run.lora)
    kind = DTYPES[dtype or "float32"]

    def read(name: str) -> np.ndarray:
        piece = pieces[name]
        ours = np.asarray(jax.device_get(weights[piece.path][piece.index]))
        return _rounded(name, piece.theirs(ours), kind)

    tensors = {name: (piece.shape, kind) for name, piece in pieces.items()}
    safetensors.write_file(
        folder / "adapter_model.safetensors", list(tensors), tensors, read
    )
    base = warm_start.parsed(run.init_from)[0]
    settings = peft.config(family, run.lora, pieces, base)
    _json(folder / "adapter_config.json", settings)
    return tensors


def _describe(
    folder: pathlib.Path,
    settings: dict[str, Any],
    tensors: Tensors,
    tokenizer: data.Tokenizer | None,
    imported: pathlib.Path,
) -> None:
    """Writes config.json, generation_config.json and the tokenizer's files.

    Args:
      imported: the generation_config.json of an import, if there is one.
    """
    generation: dict[str, Any] = {}
    if tokenizer is not None:
        end_id = tokenizer.end_id
        generation = {"bos_token_id": end_id, "eos_token_id": end_id}
        for name, content in tokenizer.published().items():
            (folder / name).write_bytes(content)
    if imported.is_file():
        generation = safetensors.json_object(imported)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings |= {name: generation[name] for name in ids if name in generation}
    kinds = {str(dtype) for _, dtype in tensors.values()}
    settings["torch_dtype"] = kinds.pop() if len(kinds) == 1 else "float32"
    _json(folder / "config.json", settings)
    if generation:
        _json(folder / "generation_config.json", generation)


def _card(
    folder: pathlib.Path,
    run: RunConfig,
    family: Family,
    workdir: Workdir,
    step: int,
    tensors: Tensors,
) -> None:
    """Writes README.md: the model's sizes, training, last evaluation and settings."""
    count = sum(int(np.prod(shape)) for shape, _ in tensors.values())
    tokens = step * run.batch_size * run.seq_len
    size = f"{count:,} numbers in {len(tensors)} tensors"
    lines = [
        "---",
        "library_name: " + ("peft" if _is_adapter(tensors) else "transformers"),
        "---",
        f"# {workdir.path.absolute().name}, step {step}",
        "",
        f"A {family.name} model trained with scaletrain: {size}.",
        "",
        "## Training",
        f"- data: {_source(run)}",
        f"- tokens: {tokens:,} ({step:,} steps of {run.batch_size} x {run.seq_len})",
        f"- optimizer: {run.optim.name}, peak rate {run.optim.learning_rate}",
    ]
    if run.init_from:
        lines.append(f"- started from: {run.init_from}")
    lines += ["", "## Evaluation", *_evaluation(workdir, step)]
    lines += ["", "## Settings", "```json", config.to_json(run).rstrip(), "```", ""]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _is_adapter(tensors: Tensors) -> bool:
    return any(".lora_A." in name for name in tensors)


def _source(run: RunConfig) -> str:
    path = f" {run.data.path}" if run.data.path else ""
    return f"{run.data.source}{path}, tokenizer {run.data.tokenizer}"


def _evaluation(workdir: Workdir, step: int) -> list[str]:
    """Returns a line for each number of the last evaluation up to `step`."""
    evaluation = {}
    for record in workdir.records():
        if "eval_loss" in record and record["step"] <= step:
            evaluation = record
    if not evaluation:
        return ["- none"]
    names = ("eval_loss", "eval_perplexity", "eval_bits_per_byte")
    scores = {name: evaluation[name] for name in names if name in evaluation}
    return [f"- step: {evaluation['step']}"] + [
        # A number that is not finite is null in metrics.jsonl: JSON has none such.
        f"- {name.removeprefix('eval_')}: "
        + (f"{value:.4f}" if isinstance(value, (int, float)) else "not finite")
        for name, value in scores.items()
    ]


def _json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
