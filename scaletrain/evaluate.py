"""Loss, perplexity and bits per byte of a split."""

import functools
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from scaletrain import config, data, mesh, sharding
from scaletrain.checkpoint import warm_start
from scaletrain.config import RunConfig
from scaletrain.errors import DataError
from scaletrain.program import Program, build
from scaletrain.step import eval_step


def evaluate(
    program: Program,
    weights: Any,
    corpus: Any,
    sequences: Any,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Returns the numbers of a split; none if it has no sequences.

    `loss` is in nats per token. `bits_per_byte` divides the loss of all predicted
    tokens, end-of-text included, by the UTF-8 bytes of the split's documents; with
    eval.num_batches it assumes the tokens per byte of the complete split.

    Args:
      program: with the shapes and shardings.
      weights: of the model, sharded like the program's.
      corpus: that the sequences come from, for the entropy of its bytes.
      sequences: of the split.
      between: called before each batch; an exception from it ends the evaluation.
    """
    run = program.run
    rows = run.micro_batch_rows
    shapes = {
        name: jax.ShapeDtypeStruct((rows, run.seq_len), s.dtype, sharding=s.sharding)
        for name, s in program.batch.items()
    }
    if len(sequences) == 0:
        return {}
    batches = data.validation_batches(
        sequences,
        batch_size=rows,
        rows=sharding.local_rows(shapes["tokens"]),
        num_batches=run.eval.num_batches * run.accumulate_steps,
    )
    sums = np.zeros(2)
    execute = _jitted(program)
    for batch in batches:
        between()
        out = execute(weights, sharding.place(batch, shapes))
        sums += [float(v) for v in jax.device_get((out.loss, out.weight))]
    loss = sums[0] / sums[1]
    numbers = {
        "loss": loss,
        # exp(710) overflows a float64.
        "perplexity": math.exp(min(loss, 700)) if math.isfinite(loss) else loss,
        "tokens": int(sums[1]),
    }
    split = sequences.split
    if split is not None:
        nats = loss * (split.num_tokens - 1)
        numbers["bits_per_byte"] = nats / split.num_bytes / math.log(2)
        baselines = data.baselines(corpus, split)
        numbers |= {f"bits_per_byte_{name}": v for name, v in baselines.items()}
    return numbers


@functools.lru_cache(maxsize=2)
def _jitted(program: Program) -> Any:
    """Returns the jitted step; the cache spares later evaluations the compilation."""
    return jax.jit(functools.partial(eval_step, program=program))


def evaluate_checkpoint(
    run: RunConfig, workdir: str, step: int | None, split: str
) -> dict[str, Any]:
    """Returns the numbers of a split under a checkpoint, and its step.

    Args:
      run: the settings.
      workdir: the folder of a run or an import.
      step: the checkpoint; None for the newest.
      split: "train" or "validation".

    Raises:
      ScaletrainError: no such checkpoint, or settings that do not fit it.
    """
    run = config.resolve(run.for_evaluation, jax.device_count())
    devices = mesh.build(run.mesh)
    program = build(run, devices)
    with jax.set_mesh(devices):
        step, weights = warm_start.weights_of(workdir, run, step, program.state)
        tokenizer = warm_start.tokenizer_of(workdir, run)
        corpus = data.prepare(run, _say, tokenizer)
        sequences = data.sequences(corpus, split, run)
        numbers = evaluate(program, weights, corpus, sequences)
    if not numbers:
        raise DataError(
            f"--split={split}; it holds no sequence of seq_len={run.seq_len}; "
            "raise data.validation_fraction, or lower seq_len."
        )
    return {"step": step, **numbers}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def in_words(numbers: dict[str, Any]) -> str:
    """Returns the numbers of a split as text for the terminal."""
    if "loss" not in numbers:
        evaluated = numbers.get("evaluated", True)
        return "has no sequence" if evaluated else "was not evaluated"
    text = f"loss {numbers['loss']:.4f}, perplexity {numbers['perplexity']:.2f}"
    if "bits_per_byte" in numbers:
        text += (
            f", {numbers['bits_per_byte']:.3f} bits per byte (entropy models of the "
            f"training bytes: order 0 {numbers['bits_per_byte_order0']:.3f}, "
            f"order 1 {numbers['bits_per_byte_order1']:.3f})"
        )
    return text
