"""The records of a run: on disk, in TensorBoard and, briefly, on the terminal."""

import contextlib
import json
import sys
from typing import Any

import jax

from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.files import atomic_write
from scaletrain.monitor.tensorboard import Board
from scaletrain.record import finite
from scaletrain.workdir import Workdir


class Recorder:
    """Writes records to `metrics.jsonl`, TensorBoard and, briefly, the terminal.

    A disk that fails ends no run: a warning is printed once. Records wait in memory
    until the disk works again; TensorBoard events end.
    """

    def __init__(self, workdir: Workdir, run: RunConfig, start_step: int):
        self.run, self.lead = run, jax.process_index() == 0
        self.evaluated = False  # whether start_step has an evaluation; in process 0
        if not self.lead:
            return
        self._path = workdir.metrics
        self._keep(workdir, start_step)
        self._file = self._path.open("ab", buffering=0)
        self._waiting, self._warned = b"", False
        self._board: Board | None = None
        try:
            self._board = Board(workdir.path, start_step)
        except OSError as err:
            self._give_up_board(err)

    def _keep(self, workdir: Workdir, start_step: int) -> None:
        """Drops records of steps that will be taken again, and incomplete lines."""
        if not self._path.exists():
            return
        kept = [pair for pair in workdir.lines() if pair[1]["step"] <= start_step]
        self.evaluated = any(
            record["step"] == start_step and "eval_loss" in record for _, record in kept
        )
        atomic_write(self._path, b"".join(line for line, _ in kept))

    def write(self, record: dict[str, Any]) -> None:
        """Appends one record; it must hold "step"."""
        if not self.lead:
            return
        clean = finite(record)
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
            self._warned = False
        except OSError as err:
            if not self._warned:
                say(f"warning: {self._path}; {err.strerror}; make room; records wait")
            self._warned = True

    def _give_up_board(self, err: OSError) -> None:
        say(f"warning: {self._path.parent}; no TensorBoard events ({err.strerror})")
        board, self._board = self._board, None
        if board:
            with contextlib.suppress(
                OSError
            ):  # closing writes the rest, which may fail again
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
