"""Loss, perplexity and bits per byte of a split."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from scaletrain import config, data, mesh, sharding, step
from scaletrain.checkpoint import warm_start
from scaletrain.config import PrecisionConfig, RunConfig
from scaletrain.errors import DataError
from scaletrain.files import atomic_file, check_room
from scaletrain.program import Program, build


def evaluate(
    program: Program,
    weights: Any,
    corpus: Any,
    sequences: Any,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Returns the numbers of a split, empty when it has no sequences.

    `loss` is in nats per token. `bits_per_byte` spreads the loss of all predicted
    tokens, end-of-text among them, over the UTF-8 bytes of the split's documents; with
    eval.num_batches it assumes the split's own ratio of tokens to bytes.

    Args:
      between: called before each batch; what it raises ends the evaluation.
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
    found = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)) if math.isfinite(loss) else loss,
        "tokens": int(sums[1]),
    }
    split = sequences.split
    if split is not None:
        nats = loss * (split.num_tokens - 1)
        found["bits_per_byte"] = nats / split.num_bytes / math.log(2)
        counted = data.baselines(corpus, split)
        found |= {f"bits_per_byte_{k}": v for k, v in counted.items()}
    return found


@functools.lru_cache(maxsize=2)
def _jitted(program: Program) -> Any:
    return jax.jit(functools.partial(step.eval_step, program=program))


def run(run: RunConfig, workdir: str, at: int | None, split: str) -> dict[str, Any]:
    """Returns the numbers of `split` under the checkpoint of step `at`.

    Raises:
      ScaletrainError: no such checkpoint, or settings it was not made with.
    """
    run = config.resolve(run.for_evaluation, jax.device_count())
    grid = mesh.build(run.mesh)
    program = build(run, grid)
    with jax.set_mesh(grid):
        at, weights = warm_start.weights_of(workdir, run, at, program.state)
        tokenizer = warm_start.tokenizer_of(workdir, run)
        corpus = data.prepare(run, _tell, tokenizer)
        sequences = data.sequences(corpus, split, run)
        found = evaluate(program, weights, corpus, sequences)
    if not found:
        raise DataError(
            f"--split={split}; it holds no sequence of seq_len={run.seq_len}; "
            "raise data.validation_fraction, or lower seq_len."
        )
    return {"step": at, **found}


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def score(
    run: RunConfig, workdir: str, at: int | None, tokens: str, save_logits: str | None
) -> dict[str, Any]:
    """Returns the loss of given ids; writes their logits if asked to.

    Everything is computed in float32, whatever the settings say.

    Args:
      tokens: an .npy file of ids [B, T]; each row is a document from its start.
      save_logits: an .npy file to be written: float32 [B, T, V].

    Raises:
      ScaletrainError: no such checkpoint, or ids it cannot be asked about.
    """
    ids_BT = _ids(tokens, run)
    model = dataclasses.replace(run.model, attention="xla")  # rows of any length
    run = dataclasses.replace(
        run, model=model, precision=PrecisionConfig(compute="float32")
    )
    run = config.resolve(run, jax.device_count())
    grid = mesh.build(run.mesh)
    program = build(run, grid)
    B, T = ids_BT.shape
    shards = run.batch_shards
    execute = jax.jit(functools.partial(step.logits_step, program=program))
    whole = jax.NamedSharding(grid, jax.P())
    nats = 0.0
    # TPUs and GPUs multiply float32 in shorter formats unless told otherwise.
    with jax.set_mesh(grid), jax.default_matmul_precision("highest"):
        at, weights = warm_start.weights_of(workdir, run, at, program.state)
        with _logits_file(save_logits, (B, T, run.model.vocab_size)) as write:
            for first in range(0, B, shards):
                rows_BT = np.zeros((shards, T), np.int32)
                real = min(shards, B - first)
                rows_BT[:real] = ids_BT[first : first + real]
                logits_BTV, nats_B = execute(weights, jax.device_put(rows_BT, whole))
                nats += float(np.asarray(nats_B)[:real].sum())
                write(logits_BTV, real)
    return {"step": at, "loss": nats / (B * (T - 1)), "tokens": B * (T - 1)}


def _ids(path: str, run: RunConfig) -> np.ndarray:
    """Returns the ids in an .npy file."""
    try:
        ids_BT = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        why = err.strerror if isinstance(err, OSError) else "no numbers are in it"
        raise DataError(
            f"--tokens={path}; it cannot be read: {why}; give an .npy file."
        ) from err
    model, problem = run.model, ""
    if not isinstance(ids_BT, np.ndarray):
        raise DataError(f"--tokens={path}; an archive of arrays; give an .npy file.")
    if ids_BT.ndim != 2 or ids_BT.dtype.kind not in "iu":
        problem = f"{ids_BT.dtype} {list(ids_BT.shape)}; give integers [B, T]"
    elif ids_BT.shape[0] < 1 or ids_BT.shape[1] < 2:
        problem = f"{list(ids_BT.shape)} holds nothing to predict; give 2 tokens a row"
    elif ids_BT.min() < 0 or ids_BT.max() >= model.vocab_size:
        problem = f"ids outside 0 to {model.vocab_size - 1}; give ids of this model"
    elif model.positions == "learned" and ids_BT.shape[1] > model.max_positions:
        problem = f"{ids_BT.shape[1]} tokens a row; give {model.max_positions} or fewer"
    if problem:
        raise DataError(f"--tokens={path}; {problem}.")
    return ids_BT.astype(np.int32)


@contextlib.contextmanager
def _logits_file(
    path: str | None, shape: tuple[int, ...]
) -> Iterator[Callable[[jax.Array, int], None]]:
    """Yields what appends rows to an .npy file, which appears when it is whole.

    Not a memory map: on a full disk that ends the process instead of failing.
    """
    if not path:
        yield lambda rows, count: None
        return
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    target = pathlib.Path(path)
    check_room(f"--save_logits={path}", target.parent, 4 * math.prod(shape))
    try:
        with atomic_file(target) as file:
            np.lib.format.write_array_header_1_0(file, header)

            def write(rows: jax.Array, count: int) -> None:
                file.write(np.asarray(rows)[:count].data)

            yield write
    except OSError as err:
        raise DataError(
            f"--save_logits={path}; {err.strerror}; give a file that can be made."
        ) from err


def in_words(found: dict[str, Any]) -> str:
    """Returns the numbers as a person reads them."""
    if "loss" not in found:
        known = found.get("evaluated", True)
        return "has no sequence" if known else "was not evaluated"
    words = f"loss {found['loss']:.4f}, perplexity {found['perplexity']:.2f}"
    if "bits_per_byte" in found:
        words += (
            f", {found['bits_per_byte']:.3f} bits per byte (entropy models of the "
            f"training bytes: order 0 {found['bits_per_byte_order0']:.3f}, "
            f"order 1 {found['bits_per_byte_order1']:.3f})"
        )
    return words
