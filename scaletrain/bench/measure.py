"""The timed steps: those of `train`, taken the way its loop takes them."""

import concurrent.futures
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaletrain import compilation, data, input_pipeline, loop, sharding
from scaletrain.config import RunConfig
from scaletrain.monitor.meter import peak_memory_bytes
from scaletrain.program import Batch, Program, initial

WARM_UP = 3  # steps: a first one loads kernels, and a second may record graphs of them
Feed = Callable[[], Batch]  # the next batch, on the devices


@dataclasses.dataclass(frozen=True)
class Timed:
    """What the timed steps took."""

    step_times_s: tuple[float, ...]
    data_wait: float  # share of that time in which the devices had to wait for a batch
    compile_time_s: float
    peak_memory_bytes: int | None  # of the fullest device

    @property
    def step_time_s(self) -> float:
        """The median."""
        return float(np.median(self.step_times_s))

    @property
    def spread(self) -> float:
        """From the 10th to the 90th percentile of the step times, over the median."""
        low, high = np.percentile(self.step_times_s, (10, 90))
        return float(high - low) / self.step_time_s


class Steps:
    """The compiled step with a state and a feed, ready to go on and on."""

    def __init__(self, program: Program, asked: RunConfig, feed: Callable):
        self._peak_before = peak_memory_bytes(jax.local_devices())
        began = time.perf_counter()
        self.program, self.compiled = compilation.decided(program, asked)
        self.compile_time_s = time.perf_counter() - began
        self._feed: Feed = feed(self.program)
        self.state = initial(self.program, with_frozen=True)

    def measure(self, count: int) -> Timed:
        """Warms up and goes straight on to `count` steps that are timed."""
        times, waits = self.take(WARM_UP + count)
        return Timed(
            step_times_s=tuple(times[WARM_UP:]),
            data_wait=sum(waits[WARM_UP:]) / sum(times[WARM_UP:]),
            compile_time_s=self.compile_time_s,
            peak_memory_bytes=self._peak(),
        )

    def take(self, count: int) -> tuple[list[float], list[float]]:
        """Takes optimizer steps; returns the seconds of each, and those without work.

        As in training, a step is dispatched while the one before runs. Another thread
        notes when each is done: the host adds nothing to what it measures.
        """
        asked, fed, done = [], [], []
        began = time.perf_counter()
        with (
            concurrent.futures.ThreadPoolExecutor(1) as watch,
            loop.manual_collection(),
            jax.transfer_guard("disallow"),
        ):
            for _ in range(count):
                asked.append(time.perf_counter())
                batch = self._feed()
                fed.append(time.perf_counter())
                self.state, numbers = self.compiled(self.state, batch)
                # The devices work on this batch while the host sees to the one before.
                if done:
                    done[-1].result()
                done.append(watch.submit(_ready_at, numbers))
        ends = np.array([began, *(each.result() for each in done)])
        waits = np.maximum(0, np.array(fed) - np.maximum(asked, ends[:-1]))
        return np.diff(ends).tolist(), waits.tolist()

    def _peak(self) -> int | None:
        """Returns what a device held at most, counted by it or by the compiler.

        A device counts since the process began: when others filled it more before,
        its count says nothing of these steps.
        """
        counted = peak_memory_bytes(jax.local_devices())
        if counted is not None and counted > (self._peak_before or 0):
            return counted
        return compilation.peak_bytes(self.compiled)


def _ready_at(numbers: dict[str, Any]) -> float:
    """Returns when the devices had them."""
    jax.block_until_ready(numbers)
    return time.perf_counter()


def synthetic(program: Program) -> Feed:
    """Returns a feed of one batch of uniform tokens, each row one document."""
    B, T = program.batch["tokens"].shape
    layout = {name: shape.sharding for name, shape in program.batch.items()}

    def make() -> Batch:
        key = jax.random.key(program.run.seed)
        drawn = jax.random.randint(key, (B, T + 1), 0, program.run.model.vocab_size)
        ones = jnp.ones((B, T), jnp.int32)
        return {
            "tokens": drawn[:, :-1],
            "targets": drawn[:, 1:],
            "segments": ones,
            "positions": jnp.cumsum(ones, axis=1) - 1,
            "weights": ones.astype(jnp.float32),
        }

    batch = jax.jit(make, out_shardings=layout)()
    return lambda: batch


def from_data(program: Program) -> Feed:
    """Returns the feed of a run: the settings' own data, read ahead as in training."""
    corpus = input_pipeline.prepare(program.run)
    sequences = data.sequences(corpus, "train", program.run)
    batches = input_pipeline.batches_of(program, sequences, 0)
    return lambda: sharding.place(next(batches), program.batch)
