"""What a run says while it runs: records on disk and one line on the terminal.

FLOPs are counted in two conventions, both without recomputation, N being every matmul
weight with the output head and without the embedding lookup:
  mfu       6 N + 6 L d_attn T    a causal query sees half the keys
  mfu_palm  6 N + 12 L d_attn T   PaLM's (arXiv 2204.02311, appendix B)
A sliding window caps the keys a query sees in both.
"""

import contextlib
import json
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import jax

from scaletrain.chips import BF16_PEAK_FLOPS
from scaletrain.config import GATED, LINEARS, ModelConfig, RunConfig, adapted
from scaletrain.monitor.tensorboard import Board
from scaletrain.workdir import rewrite


def say(line: str) -> None:
    """Tells the person at the terminal, once however many processes there are."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)


def matmul_weights(model: ModelConfig) -> int:
    """Returns the number of weights a token is multiplied with, without adapters."""
    layer = sum(rows * columns for rows, columns in linears(model).values())
    return model.num_layers * layer + model.d_model * model.vocab_size


def linears(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """Returns the (inputs, outputs) of the matrices of a layer."""
    D, F = model.d_model, model.d_ff
    NH, KH = model.num_heads * model.d_head, model.num_kv_heads * model.d_head
    sizes = ((D, NH), (D, KH), (D, KH), (NH, D), (D, F), (D, F), (F, D))
    return {
        name: size
        for name, size in zip(LINEARS, sizes, strict=True)
        if name != "mlp/gate" or model.mlp in GATED
    }


def flops_per_token(run: RunConfig) -> tuple[float, float]:
    """Returns forward and backward FLOPs a token: (causal, PaLM's convention).

    A frozen matrix has no gradient of its own: 4 FLOPs a weight instead of 6.
    """
    model, lora = run.model, run.lora
    sizes = linears(model)
    adapters = sum(lora.rank * sum(sizes.get(name, ())) for name in adapted(lora))
    weights = (4 if lora.rank else 6) * matmul_weights(model)
    weights += 6 * model.num_layers * adapters
    per_key = 12 * model.num_heads * model.d_head
    seen = [keys_seen(model, i, run.seq_len) for i in range(model.num_layers)]
    causal, palm = (per_key * sum(each) for each in zip(*seen, strict=True))
    return weights + causal, weights + palm


def keys_seen(model: ModelConfig, layer: int, seq_len: int) -> tuple[float, float]:
    """Returns the keys a query sees on average: (causal, PaLM's convention)."""
    window, every = model.sliding_window, model.global_every
    if not 0 < window < seq_len or (every and (layer + 1) % every == 0):
        return seq_len / 2, seq_len
    return window * (1 - window / (2 * seq_len)), window


def throughput(
    run: RunConfig, step_time_s: float, devices: list[Any]
) -> dict[str, Any]:
    """Returns speed and both MFUs; None where the chip's peak is not known."""
    tokens_per_s = run.batch_size * run.seq_len / step_time_s
    peak = BF16_PEAK_FLOPS.get(devices[0].device_kind)
    share = tokens_per_s / (peak * len(devices)) if peak else None
    causal, palm = flops_per_token(run)
    return {
        "step_time_s": step_time_s,
        "tokens_per_s": tokens_per_s,
        "mfu": share and share * causal,
        "mfu_palm": share and share * palm,
        "peak_flops_per_device": peak,
    }


class Recorder:
    """Writes records to `metrics.jsonl`, TensorBoard and, briefly, the terminal.

    A disk that fails ends no run here: it is told of once. Records wait for it;
    TensorBoard does without.
    """

    def __init__(self, workdir: pathlib.Path, run: RunConfig, start_step: int):
        self.run, self.lead = run, jax.process_index() == 0
        self.evaluated = False  # whether the last step of before was; in process 0
        if not self.lead:
            return
        self._path = workdir / "metrics.jsonl"
        self._keep(start_step)
        self._file = self._path.open("ab", buffering=0)
        self._waiting, self._told = b"", False
        self._board: Board | None = None
        try:
            self._board = Board(workdir, start_step)
        except OSError as err:
            self._give_up_board(err)

    def _keep(self, start_step: int) -> None:
        """Drops records of steps that are about to be taken again, and half lines."""
        if not self._path.exists():
            return
        told = [pair for pair in _told(self._path) if pair[1]["step"] <= start_step]
        self.evaluated = any(
            record["step"] == start_step and "eval_loss" in record for _, record in told
        )
        rewrite(self._path, b"".join(line for line, _ in told))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; it must hold "step"."""
        if not self.lead:
            return
        # NaN is not JSON: what is not finite is written as null.
        clean = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in record.items()
        }
        self._append(json.dumps(clean).encode() + b"\n")
        if self._board is None:
            return
        scalars = {
            name: value
            for name, value in clean.items()
            if isinstance(value, int | float) and name not in ("step", "batch_hash")
        }
        try:
            self._board.write(record["step"], scalars)
        except OSError as err:
            self._give_up_board(err)

    def _append(self, line: bytes) -> None:
        self._waiting += line
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
            self._told = False
        except OSError as err:
            if not self._told:
                say(f"warning: {self._path}; {err.strerror}; make room; records wait")
            self._told = True

    def _give_up_board(self, err: OSError) -> None:
        say(f"warning: {self._path.parent}; no TensorBoard events ({err.strerror})")
        board, self._board = self._board, None
        if board:
            with contextlib.suppress(OSError):  # it tries what is left once more
                board.close()

    def progress(self, record: dict[str, Any]) -> None:
        """Shows step, loss, speed, MFU and time left on standard error."""
        if not self.lead:
            return
        left = (self.run.num_steps - record["step"]) * record["step_time_s"]
        mfu = "n/a" if record["mfu"] is None else f"{record['mfu']:.1%}"
        line = (
            f"step {record['step']}/{self.run.num_steps}  loss {record['loss']:.4f}  "
            f"{record['tokens_per_s']:,.0f} tokens/s  MFU {mfu}  "
            f"ETA {int(left // 60)}m{int(left % 60):02d}s"
        )
        live = sys.stderr.isatty() and record["step"] < self.run.num_steps
        print(
            f"\r{line}\033[K" if live else line,
            end="" if live else "\n",
            file=sys.stderr,
            flush=True,
        )

    def close(self) -> None:
        """Ends the files."""
        if self.lead:
            self._file.close()
            if self._board:
                self._board.close()


def newest_saved(workdir: pathlib.Path) -> int | None:
    """Returns the newest step that a run here knew to be saved."""
    told = [record.get("newest_saved") for record in records(workdir)]
    return max((step for step in told if isinstance(step, int)), default=None)


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns what a run's metrics.jsonl holds, but a line that is cut off."""
    return [record for _, record in _told(workdir / "metrics.jsonl")]


def _told(path: pathlib.Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yields the lines that are records, and the records."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            whole = line.endswith(b"\n") and isinstance(record, dict)
            if whole and isinstance(record.get("step"), int):
                yield line, record


def peak_memory_bytes(devices: list[Any]) -> int | None:
    """Returns the most memory a device here has held; None where it is not counted."""
    stats = [
        d.memory_stats() or {}
        for d in devices
        if d.process_index == jax.process_index()
    ]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(peaks) if peaks else None
