"""Loss and logits of given token ids under a checkpoint, in float32."""

import contextlib
import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from scaletrain import config, mesh
from scaletrain.checkpoint import warm_start
from scaletrain.config import PrecisionConfig, RunConfig
from scaletrain.errors import DataError
from scaletrain.files import atomic_file, check_room
from scaletrain.program import build
from scaletrain.step import logits_step


def score(
    run: RunConfig,
    workdir: str,
    step: int | None,
    tokens: str,
    save_logits: str | None,
) -> dict[str, Any]:
    """Returns the loss of given ids, in nats per token; writes their logits if asked.

    The computation is in float32, whatever `precision.compute` is.

    Args:
      run: the settings.
      workdir: the folder of a run or an import.
      step: the checkpoint; None for the newest.
      tokens: an .npy file of ids [B, T]; each row is the start of a document.
      save_logits: an .npy file to write: float32 [B, T, V]; None for no file.

    Raises:
      ScaletrainError: no such checkpoint, or ids that the model does not have.
    """
    ids_BT = _ids(tokens, run)
    model = dataclasses.replace(run.model, attention="xla")  # rows of any length
    run = dataclasses.replace(
        run, model=model, precision=PrecisionConfig(compute="float32")
    )
    run = config.resolve(run, jax.device_count())
    devices = mesh.build(run.mesh)
    program = build(run, devices)
    B, T = ids_BT.shape
    shards = run.batch_shards
    execute = jax.jit(functools.partial(logits_step, program=program))
    replicated = jax.NamedSharding(devices, jax.P())
    nats = 0.0
    # TPUs and GPUs multiply float32 in shorter formats by default.
    with jax.set_mesh(devices), jax.default_matmul_precision("highest"):
        step, weights = warm_start.weights_of(workdir, run, step, program.state)
        with _logits_file(save_logits, (B, T, run.model.vocab_size)) as write:
            for first in range(0, B, shards):
                rows_BT = np.zeros((shards, T), np.int32)
                count = min(shards, B - first)  # the other rows are padding
                rows_BT[:count] = ids_BT[first : first + count]
                rows_BT = jax.device_put(rows_BT, replicated)
                logits_BTV, nats_B = execute(weights, rows_BT)
                nats += float(np.asarray(nats_B)[:count].sum())
                write(logits_BTV, count)
    return {"step": step, "loss": nats / (B * (T - 1)), "tokens": B * (T - 1)}


def _ids(path: str, run: RunConfig) -> np.ndarray:
    """Returns the ids [B, T] in an .npy file, checked against the model."""
    try:
        ids_BT = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as err:
        reason = err.strerror if isinstance(err, OSError) else "no numbers are in it"
        raise DataError(
            f"--tokens={path}; it cannot be read: {reason}; give an .npy file."
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
    """Yields a function (rows, count) that appends the first rows to an .npy file.

    The file appears when it is complete. It is not a memory map: on a full disk writing
    to one kills the process instead of raising an error.
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
