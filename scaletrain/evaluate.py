"""Loss, perplexity and bits per byte of a split."""

import functools
import math
import sys
from typing import Any

import jax
import numpy as np

from scaletrain import checkpoint, config, data, mesh, sharding, step
from scaletrain.config import RunConfig
from scaletrain.errors import DataError
from scaletrain.step import Program


def evaluate(
    program: Program, weights: Any, corpus: Any, sequences: Any
) -> dict[str, Any]:
    """Returns the numbers of a split, empty when it has no sequences.

    `loss` is in nats per token. `bits_per_byte` spreads the loss of all predicted
    tokens, end-of-text among them, over the UTF-8 bytes of the split's documents; with
    eval.num_batches it assumes the split's own ratio of tokens to bytes.
    """
    run = program.run
    rows = run.batch_size // run.accumulate_steps
    shapes = {
        name: jax.ShapeDtypeStruct((rows, run.seq_len), s.dtype, sharding=s.sharding)
        for name, s in program.batch.items()
    }
    if len(sequences) == 0:
        return {}
    batches = data.validation_batches(
        sequences,
        batch_size=rows,
        rows=sharding.rows_here(shapes["tokens"]),
        num_batches=run.eval.num_batches,
    )
    sums = np.zeros(2)
    execute = _jitted(program)
    for batch in batches:
        out = execute(weights, sharding.place(batch, shapes))
        sums += [float(v) for v in jax.device_get((out.loss, out.weight))]
    loss = sums[0] / sums[1]
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "tokens": int(sums[1]),
    }
    split = sequences.split
    if split is not None:
        nats = loss * (split.num_tokens - 1)
        found["bits_per_byte"] = nats / split.num_bytes / math.log(2)
        found |= {f"bits_per_byte_{k}": v for k, v in data.baselines(corpus).items()}
    return found


@functools.lru_cache(maxsize=2)
def _jitted(program: Program) -> Any:
    return jax.jit(functools.partial(step.eval_step, program=program))


def run(run: RunConfig, workdir: str, at: int | None, split: str) -> dict[str, Any]:
    """Returns the numbers of `split` under the checkpoint of step `at`.

    Raises:
      ScaletrainError: no such checkpoint, or settings it was not made with.
    """
    run = config.resolve(run, jax.device_count())
    grid = mesh.build(run.mesh)
    program = step.build(run, grid)
    with jax.set_mesh(grid):
        at, weights = checkpoint.weights_of(workdir, run, at, program.state)
        corpus = data.prepare(run, lambda line: print(line, file=sys.stderr))
        sequences = data.sequences(corpus, split, run)
        found = evaluate(program, weights, corpus, sequences)
    if not found:
        raise DataError(
            f"--split={split}; it holds no sequence of seq_len={run.seq_len}; "
            "raise data.validation_fraction, or lower seq_len."
        )
    return {"step": at, **found}


def in_words(found: dict[str, Any]) -> str:
    """Returns the numbers as a person reads them."""
    words = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
    if "bits_per_byte" in found:
        words += (
            f", {found['bits_per_byte']:.3f} bits per byte (entropy models of the "
            f"training bytes: order 0 {found['bits_per_byte_order0']:.3f}, "
            f"order 1 {found['bits_per_byte_order1']:.3f})"
        )
    return words
