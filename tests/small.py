"""A run small enough for a test, and a few ways to take its steps."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import optax

from scaletrain import commands, compilation, config, mesh, train
from scaletrain.config import (
    DataConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
)
from scaletrain.program import build, initial_state

MODEL = ModelConfig(
    num_layers=2,
    d_model=32,
    num_heads=4,
    num_kv_heads=2,
    d_head=8,
    d_ff=64,
    vocab_size=64,
)
RUN = RunConfig(
    num_steps=20,
    batch_size=16,
    seq_len=32,
    model=MODEL,
    mesh=MeshConfig(),
    precision=PrecisionConfig(compute="float32"),
    optim=OptimConfig(learning_rate=1e-2),
    data=DataConfig(source="synthetic"),
)


def changed(run, **settings):
    """Returns `run` with settings exchanged, `a__b` standing for `a.b`."""
    return config.applied(
        run, {path.replace("__", "."): value for path, value in settings.items()}
    )


def random_batch(run, seed):
    """Returns tokens cut into documents of random lengths, with uneven weights."""
    rng = np.random.default_rng(seed)
    B, T = run.batch_size, run.seq_len
    tokens = rng.integers(0, run.model.vocab_size, (B, T + 1), dtype=np.int32)
    starts = rng.random((B, T)) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1, dtype=np.int32)
    begin = np.maximum.accumulate(np.where(starts, np.arange(T), 0), axis=1)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segments": segments,
        "positions": (np.arange(T) - begin).astype(np.int32),
        "weights": (rng.random((B, T)) < rng.random((B, 1))).astype(np.float32),
    }


def text_batch(run):
    """Returns a batch of a source file: its gradient is not mostly noise."""
    B, T = run.batch_size, run.seq_len
    raw = pathlib.Path(functools.__file__).read_bytes()[: B * (T + 1)]
    rows = np.frombuffer(raw, np.uint8).reshape(B, T + 1).astype(np.int32)
    rows %= run.model.vocab_size
    positions = np.tile(np.arange(T, dtype=np.int32), (B, 1))
    weights = np.ones((B, T), np.float32)
    return {
        "tokens": rows[:, :-1],
        "targets": rows[:, 1:],
        "segments": np.ones_like(positions),
        "positions": positions,
        "weights": weights,
    }


@functools.cache
def _untrained(model, precision, lora, seed):
    """Returns the state of a seed without that of an optimizer."""
    run = changed(RUN, model=model, precision=precision, lora=lora, seed=seed)
    make = functools.partial(initial_state, run, optax.identity())
    return jax.device_get(jax.jit(make)())


class Taken:
    """A program that takes steps on the first devices of this machine."""

    def __init__(self, run):
        devices = run.mesh.num_devices
        self.run = config.resolve(run, devices)
        self.mesh = mesh.build(self.run.mesh, jax.devices()[:devices])
        self.program = build(self.run, self.mesh)

    @functools.cached_property
    def state(self):
        """Where it is; many a test needs none."""
        return self.initial()

    @functools.cached_property
    def execute(self):
        """The compiled step; many a test needs none."""
        program = self.program
        with jax.set_mesh(self.mesh):
            return (
                compilation.jitted(program)
                .lower(program.state, program.batch)
                .compile()
            )

    def initial(self):
        """Returns the state of the seed, from the host to where it belongs."""
        run = self.run
        # The optimizer's part is compiled alone: all optimizers begin with one model.
        state = _untrained(run.model, run.precision, run.lora, run.seed)
        make = jax.jit(lambda: self.program.tx.init(state.params))
        state = dataclasses.replace(state, opt_state=jax.device_get(make()))
        layout = jax.tree.map(lambda leaf: leaf.sharding, self.program.state)
        return jax.device_put(state, layout)

    def stand_in(self, monkeypatch):
        """Makes runs see these devices, start where this did and take this step."""
        monkeypatch.setattr(jax, "device_count", lambda: self.mesh.size)
        monkeypatch.setattr(mesh, "build", lambda settings: self.mesh)
        monkeypatch.setattr(train, "build", lambda *args: self.program)
        monkeypatch.setattr(
            compilation, "compiled", lambda program, ready: self.execute
        )
        monkeypatch.setattr(train, "initial", lambda program, **_: self.initial())

    def step(self, batch):
        """Takes one optimizer step; returns its numbers as floats."""
        placed = {
            name: jax.device_put(rows, self.program.batch[name].sharding)
            for name, rows in batch.items()
        }
        self.state, numbers = self.execute(self.state, placed)
        return {name: float(value) for name, value in numbers.items()}

    def losses(self, steps):
        """Returns the losses of the first steps on random batches."""
        return [self.step(random_batch(self.run, s))["loss"] for s in range(steps)]


def replace_command(monkeypatch, name, execute):
    """Puts `execute` in the place of what a command of the command line does."""
    command = commands.COMMANDS[name]._replace(execute=execute)
    monkeypatch.setitem(commands.COMMANDS, name, command)
