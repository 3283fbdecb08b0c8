"""Predicted against published steps; writes docs/accuracy.md.

    python tests/accuracy.py [NAME ...]

Each row is a recipe of AI-Hypercomputer's MaxText with the batch, sequence and
rematerialisation it was published with, as far as scaletrain has the same; what it has
not is told beside the row. Tokens/s a chip are compared.
"""

import dataclasses
import importlib.util
import pathlib
import statistics
import sys

import jax

from scaletrain import config
from scaletrain.config import DataConfig, MeshConfig, PrecisionConfig
from scaletrain.config.load import from_config_dict
from scaletrain.hardware import slices
from scaletrain.plan import compiler

ROOT = pathlib.Path(__file__).parent.parent
FULL = {"remat": "full"}
SAVED = {"remat": "save", "remat_save": ("residual", "query", "key", "value")}
OFFLOADED = {
    "remat": "save",
    "remat_offload": ("residual", "query", "key", "value", "attention"),
}
# MaxText's model of 16B: its default with 4 x the heads and hidden units and 2 x the
# width and layers. Its MFU counts every score; tokens/s are worked out from it.
GPT_16B = {
    "d_model": 4096, "num_layers": 32, "num_heads": 64, "num_kv_heads": 64,
    "d_head": 128, "d_ff": 28_672, "vocab_size": 32_000,
}  # fmt: skip
BF16 = PrecisionConfig(params="bfloat16")
MEM = PrecisionConfig()


@dataclasses.dataclass(frozen=True)
class Row:
    """A published run."""

    model: str  # of experiments/families.py
    topology: str
    batch: int  # sequences of a step
    seq_len: int
    remat: dict
    tokens_per_s_per_chip: float
    source: str
    shape: dict = dataclasses.field(default_factory=dict)  # other sizes than its own
    label: str = ""  # of a model with those sizes
    precision: PrecisionConfig = MEM
    num_slices: int = 1


RECIPES = "tpu-recipes: training/{}"
ROWS = (
    Row("llama3.1-8b", "v6e:16x16", 1024, 8192, OFFLOADED, 7190, "4.55 s a step, bs 4"),
    Row("llama3.1-8b", "v6e:2x4", 24, 8192, OFFLOADED, 7144, "3.44 s a step, bs 3"),
    Row("llama3.1-70b", "v6e:4x8", 64, 8192, OFFLOADED, 921, "bf16 weights, bs 2",
        precision=BF16),
    Row("llama2-70b", "v6e:16x16", 512, 4096, OFFLOADED, 905, "bs 2"),
    Row("mistral-7b-v0.1", "v6e:16x16", 1536, 8192, OFFLOADED, 7777, "bs 6 assumed"),
    Row("gemma3-12b", "v6e:16x16", 256, 8192, OFFLOADED, 4478, "bs 1 assumed"),
    Row("llama2-7b", "v5e:16x16", 1536, 2048, FULL, 1197, "61.1% MFU, bs 6",
        shape=GPT_16B, label="MaxText 16B"),
    Row("llama2-7b", "v5e:16x16", 1024, 2048, FULL, 677, "66.9% MFU, bs 4",
        shape=GPT_16B | {"d_model": 8192}, label="MaxText 32B"),
    Row("llama2-70b", "v5p:8x8x8", 2048, 4096, SAVED, 692, "bs 4"),
    Row("llama3.1-70b", "tpu7x:4x4x4", 256, 8192, SAVED, 2687, "12.20 s a step"),
    Row("llama3.1-70b", "tpu7x:4x8x8", 1024, 8192, SAVED, 2671, "12.27 s a step"),
    Row("llama3.1-405b", "tpu7x:4x8x8", 1536, 8192, FULL, 500, "98.3 s a step"),
)  # fmt: skip


def presets():
    """Returns the module of published sizes."""
    path = ROOT / "experiments" / "families.py"
    spec = importlib.util.spec_from_file_location("families", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def predicted(row):
    """Returns the slice of a row and what the compiler says of its step."""
    run, problems = from_config_dict(presets().get_config(row.model))
    assert not problems, problems
    slice_ = slices.parse(row.topology, row.num_slices)
    run = dataclasses.replace(
        run,
        model=dataclasses.replace(run.model, **row.shape, **row.remat),
        batch_size=row.batch,
        seq_len=row.seq_len,
        accumulate_steps=1,
        precision=row.precision,
        mesh=MeshConfig(fsdp=-1),
        data=DataConfig(source="synthetic"),
    )
    return slice_, compiler.compile(config.resolve(run, slice_.devices), slice_)


def main():
    """Compiles every row that is asked for, and writes the table."""
    asked = sys.argv[1:]
    lines, errors = [], []
    for row in ROWS:
        if asked and row.model not in asked:
            continue
        slice_, said = predicted(row)
        mine = row.batch * row.seq_len / said.step.seconds / slice_.chips
        error = mine / row.tokens_per_s_per_chip - 1
        errors.append(abs(error))
        fits = said.fits and said.peak_bytes <= slice_.chip.hbm_bytes
        lines.append(
            f"| {row.label or row.model} | {row.topology} "
            f"| {row.batch} x {row.seq_len} | "
            f"{row.tokens_per_s_per_chip:,.0f} | {mine:,.0f} | {error:+.0%} | "
            f"{said.peak_bytes / 2**30:.1f} "
            f"{'' if fits else '(does not fit)'} | {row.source} |"
        )
        print(lines[-1], flush=True)
    text = __doc__.split("\n\n")[0] + "\n"
    text = f"""# Predicted against published steps

Made by `make accuracy` with jax {jax.__version__}. Tokens/s a chip; published figures
are MaxText's, from the public TPU recipes, and count attention kernels, compiler flags
and host offloading that scaletrain may lack: the error holds those differences too.
What the recipes keep in 16 bits or on the host and scaletrain does not is why some rows
need more memory than a device has. Constants are not fitted to these rows.

Median absolute error {statistics.median(errors):.0%}, worst {max(errors):.0%}.

| model | slice | batch | published | predicted | error | GiB a device | note |
|---|---|---|---|---|---|---|---|
""" + "\n".join(lines)
    if not asked:
        (ROOT / "docs").mkdir(exist_ok=True)
        (ROOT / "docs" / "accuracy.md").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
