"""Adapters in the layout of the PEFT library: names, shapes and settings.

PEFT's matrices are A (rank, inputs) and B (outputs, rank) in every family, so their
layout follows from the names alone.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from scaletrain.config import LoraConfig
from scaletrain.errors import CheckpointError
from scaletrain.hf.families.mapping import Entry, Family, Piece
from scaletrain.matrices import LAYER


def tensors(entries: Iterable[Entry], lora: LoraConfig) -> dict[str, Piece]:
    """Returns the parameter of each tensor of an adapter file, by the tensor's name.

    Raises:
      CheckpointError: the family stores an adapted matrix joined with others.
    """
    pieces = {}
    targets = {f"blocks/{name}/weight": name for name in lora.adapted}
    for entry in entries:
        adapted = [piece for piece in entry.pieces if piece.path in targets]
        if adapted and len(entry.pieces) > 1:
            raise CheckpointError(
                f"lora.targets={targets[adapted[0].path]}; {entry.name} holds it "
                "together with other matrices, which adapter files cannot say; "
                "use --merge."
            )
        for piece in adapted:
            inputs, outputs = map(" ".join, LAYER[targets[piece.path]].letters)
            sizes = {**piece.sizes, "r": lora.rank}
            path = piece.path.removesuffix("weight")
            name = f"base_model.model.{entry.name.removesuffix('.weight')}"
            pieces[f"{name}.lora_A.weight"] = Piece(
                f"{path}lora_a", piece.index, f"r ({inputs}) -> {inputs} r", sizes
            )
            pieces[f"{name}.lora_B.weight"] = Piece(
                f"{path}lora_b", piece.index, f"({outputs}) r -> r {outputs}", sizes
            )
    return pieces


def config(
    family: Family, lora: LoraConfig, names: Mapping[str, Piece], base: str
) -> dict[str, Any]:
    """Returns the content of adapter_config.json.

    Args:
      family: the family of the base model.
      lora: rank and scale of the adapters.
      names: the tensors of the adapter file, from `tensors`.
      base: path or name of the base model's checkpoint.
    """
    modules = {".".join(name.split(".")[-4:-2]) for name in names}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(modules),
        "fan_in_fan_out": family.inputs_first,  # PEFT's name for that layout
        "inference_mode": True,
    }
