"""The timed steps: those of `train`, dispatched as in its loop."""

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

# Steps before the timed ones: the first loads kernels, the second may record graphs.
WARM_UP = 3
Feed = Callable[[], Batch]  # returns the next batch, on the devices


@dataclasses.dataclass(frozen=True)
class Timed:
    """The times and the memory of the timed steps."""

    step_times_s: tuple[float, ...]
    data_wait: float  # fraction of the step times in which devices wait for a batch
    compile_time_s: float
    peak_memory_bytes: int | None  # of the device that uses most; None = not known

    @property
    def step_time_s(self) -> float:
        """The median of the step times."""
        return float(np.median(self.step_times_s))

    @property
    def spread(self) -> float:
        """The range from the 10th to the 90th percentile, divided by the median."""
        low, high = np.percentile(self.step_times_s, (10, 90))
        return float(high - low) / self.step_time_s


class Steps:
    """The compiled step with its state and its feed; each call goes on from the last.

    Args:
      program: of the resolved run.
      configured: the run before `program.build` decided its open settings.
      feed: takes the final program and returns its feed.
    """

    def __init__(self, program: Program, configured: RunConfig, feed: Callable):
        self._peak_before = peak_memory_bytes(jax.local_devices())
        began = time.perf_counter()
        self.program, self.compiled = compilation.decided(program, configured)
        self.compile_time_s = time.perf_counter() - began
        self._feed: Feed = feed(self.program)
        self.state = initial(self.program, with_frozen=True)

    def measure(self, count: int) -> Timed:
        """Returns the times of `count` steps, which follow the warm-up directly."""
        times, waits = self.take(WARM_UP + count)
        return Timed(
            step_times_s=tuple(times[WARM_UP:]),
            data_wait=sum(waits[WARM_UP:]) / sum(times[WARM_UP:]),
            compile_time_s=self.compile_time_s,
            peak_memory_bytes=self._peak(),
        )

    def take(self, count: int) -> tuple[list[float], list[float]]:
        """Returns the seconds of each step, and the seconds of waiting for each batch.

        As in training, a step is dispatched while the previous one runs. Another thread
        records the end of each step, so that the work of the host is not measured.
        """
        requests, arrivals, done = [], [], []
        began = time.perf_counter()
        with (
            concurrent.futures.ThreadPoolExecutor(1) as watch,
            loop.manual_collection(),
            jax.transfer_guard("disallow"),
        ):
            for _ in range(count):
                requests.append(time.perf_counter())
                batch = self._feed()
                arrivals.append(time.perf_counter())
                self.state, metrics = self.compiled(self.state, batch)
                # The devices work on this batch while the host waits for the last one.
                if done:
                    done[-1].result()
                done.append(watch.submit(_ready_time, metrics))
        ends = np.array([began, *(each.result() for each in done)])
        # Devices wait from the end of their last step, or from the request if that is
        # later: before it, they wait for the host and not for data.
        waits = np.maximum(0, np.array(arrivals) - np.maximum(requests, ends[:-1]))
        return np.diff(ends).tolist(), waits.tolist()

    def _peak(self) -> int | None:
        """Returns the peak bytes of a device, measured or as the compiler planned them.

        A device counts its peak since the process began. An earlier peak that was
        higher hides that of these steps.
        """
        measured = peak_memory_bytes(jax.local_devices())
        if measured is not None and measured > (self._peak_before or 0):
            return measured
        return compilation.peak_bytes(self.compiled)


def _ready_time(metrics: dict[str, Any]) -> float:
    """Returns the time at which the devices have computed the metrics of a step."""
    jax.block_until_ready(metrics)
    return time.perf_counter()


def synthetic(program: Program) -> Feed:
    """Returns a feed that repeats one batch of random tokens; a row is a document."""
    B, T = program.batch["tokens"].shape
    shardings = {name: shape.sharding for name, shape in program.batch.items()}

    def make() -> Batch:
        key = jax.random.key(program.run.seed)
        tokens = jax.random.randint(key, (B, T + 1), 0, program.run.model.vocab_size)
        ones = jnp.ones((B, T), jnp.int32)
        return {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "segments": ones,
            "positions": jnp.cumsum(ones, axis=1) - 1,
            "weights": ones.astype(jnp.float32),
        }

    batch = jax.jit(make, out_shardings=shardings)()
    return lambda: batch


def from_data(program: Program) -> Feed:
    """Returns the feed of the data of the settings, read ahead as in training."""
    corpus = input_pipeline.prepare(program.run)
    sequences = data.sequences(corpus, "train", program.run)
    batches = input_pipeline.batches_of(program, sequences, 0)
    return lambda: sharding.place(next(batches), program.batch)
