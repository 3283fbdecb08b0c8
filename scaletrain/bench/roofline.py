"""What the hardware can do with the shapes of a run, measured where the run was.

Matmuls, attention and copies run on one device with the shapes that a device gets,
the optimizer and the collectives on the mesh. Each is repeated inside one compiled
loop, so that dispatching is not measured, and each repetition reads one number of the
one before, so that no compiler may leave it out.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from scaletrain import metrics, optim
from scaletrain.bench import timing
from scaletrain.chips import BF16_PEAK_FLOPS, COMPILER_OPTIONS
from scaletrain.config import RunConfig
from scaletrain.models.attention import Scores, attend
from scaletrain.step import Program

REPEATS = 8  # inside a loop
_ROUNDS = 3  # of which the median counts
_AHEAD, _ENOUGH_S = 16, 0.05  # calls in a round: so many, or so long
COPY_BYTES = 2**28  # far above what any chip caches
MESSAGE_BYTES = 2**27  # of what a collective makes or takes in all, as is customary


@dataclasses.dataclass(frozen=True)
class Gemm:
    """A matmul of the model as one device meets it: [rows, inputs] x [inputs, outputs].

    Rows are tokens of one part of the batch; `count` is how often a step does it.
    """

    rows: int
    inputs: int
    outputs: int
    count: int
    trained: bool  # whether its weights have gradients

    @property
    def flops(self) -> int:
        """Of one pass: forward, dgrad and wgrad each take as many."""
        return 2 * self.rows * self.inputs * self.outputs

    @property
    def passes(self) -> tuple[str, ...]:
        """What a step computes with it."""
        return ("forward", "dgrad", "wgrad") if self.trained else ("forward", "dgrad")


@dataclasses.dataclass(frozen=True)
class Attention:
    """The attention of a kind of layer as one device meets it."""

    rows: int  # sequences
    queries: int  # tokens of a sequence that lie on the device
    keys: int
    heads: int
    kv_heads: int
    d_head: int
    local: bool  # whether it looks through the sliding window
    keys_seen: float  # by a query, on average
    count: int

    @property
    def flops(self) -> float:
        """Of the forward pass; backward takes twice as many."""
        return 4 * self.rows * self.queries * self.heads * self.d_head * self.keys_seen


def gemms(run: RunConfig) -> dict[str, Gemm]:
    """Returns the matmuls of a resolved run, adapters left out, by their names."""
    model, tensor = run.model, _axis(run, "tensor")
    trained = run.lora.rank == 0
    rows = _rows(run) * run.seq_len // _axis(run, "context")
    count = model.num_layers * run.accumulate_steps
    found = {}
    for name, (inputs, outputs) in metrics.linears(model).items():
        # Tensor parallelism cuts heads and hidden units: what q, k, v, gate and up
        # give, and what o and down take.
        if name in ("attention/o", "mlp/down"):
            inputs //= tensor
        else:
            outputs //= tensor
        found[name.split("/")[1]] = Gemm(rows, inputs, outputs, count, trained)
    found["head"] = Gemm(
        rows, model.d_model, model.vocab_size // tensor, run.accumulate_steps, trained
    )
    return found


def attentions(run: RunConfig) -> dict[str, Attention]:
    """Returns the attention of local and of global layers, as far as there are any."""
    model, tensor = run.model, _axis(run, "tensor")
    kinds: dict[bool, list[int]] = {}
    for layer in range(model.num_layers):
        every = model.global_every
        local = model.sliding_window > 0 and not (every and (layer + 1) % every == 0)
        kinds.setdefault(local, []).append(layer)
    return {
        "local" if local else "global": Attention(
            rows=_rows(run),
            queries=run.seq_len // _axis(run, "context"),
            keys=run.seq_len,
            heads=model.num_heads // tensor,
            kv_heads=model.num_kv_heads // tensor,
            d_head=model.d_head,
            local=local,
            keys_seen=metrics.keys_seen(model, layers[0], run.seq_len)[0],
            count=len(layers) * run.accumulate_steps,
        )
        for local, layers in kinds.items()
    }


def _axis(run: RunConfig, name: str) -> int:
    """Returns the size of a mesh axis, inside and across slices."""
    return getattr(run.mesh, name) * getattr(run.mesh.dcn, name)


def _rows(run: RunConfig) -> int:
    """Returns the sequences of a part of the batch that lie on a device."""
    ways = _axis(run, "data") * _axis(run, "fsdp")
    return run.batch_size // run.accumulate_steps // ways


def measure(program: Program) -> dict[str, Any]:
    """Returns what the devices of a program reach; bytes and FLOPs are a second's.

    `ideal` adds up a step that does its matmuls, its attention and its optimizer's
    update at these speeds, one after the other, and nothing else.
    """
    run, grid = program.run, cast(Mesh, program.mesh)
    by_name = _gemms(run)
    attention = {name: _attention(each, run) for name, each in attentions(run).items()}
    optimizer_s = _optimizer(program)
    total = {
        "gemms_s": sum(each["count"] * sum(_times(each)) for each in by_name.values()),
        "attention_s": sum(
            each["count"] * each["forward_backward_s"] for each in attention.values()
        ),
        "optimizer_s": optimizer_s,
    }
    flops = sum(
        each.count * each.flops * len(each.passes) for each in gemms(run).values()
    )
    return {
        "gemms": by_name,
        "gemm_flops": flops / total["gemms_s"],
        "attention": attention,
        "copy_bandwidth": _copy(),
        "optimizer_s": optimizer_s,
        "collectives": {
            axis: {name: _collective(name, axis, grid) for name in _COLLECTIVES}
            for axis, size in grid.shape.items()
            if size > 1
        },
        "ideal": total | {"step_s": sum(total.values())},
    }


def _times(gemm: dict[str, Any]) -> list[float]:
    """Returns the seconds of the passes of a measured matmul."""
    return [gemm[f"{name}_s"] for name in _PASSES if f"{name}_s" in gemm]


_PASSES = {"forward": "mk,kn->mn", "dgrad": "mn,kn->mk", "wgrad": "mk,mn->kn"}


def _gemms(run: RunConfig) -> dict[str, Any]:
    """Returns the seconds and the speed of each matmul; equal ones are run once."""

    @functools.cache
    def seconds(gemm: Gemm, name: str) -> float:
        sizes = {"m": gemm.rows, "k": gemm.inputs, "n": gemm.outputs}
        letters = _PASSES[name]
        inputs, _ = letters.split("->")
        x, y = (
            _random([sizes[letter] for letter in dims], run.precision.compute)
            for dims in inputs.split(",")
        )
        # Weight gradients leave their matmul in the format they are summed in.
        dtype = run.precision.reduce if name == "wgrad" else run.precision.compute
        dot = functools.partial(jnp.einsum, letters, preferred_element_type=dtype)
        return _seconds(dot, x, y)

    found = {}
    for name, gemm in gemms(run).items():
        alike = dataclasses.replace(gemm, count=1)
        times = {f"{each}_s": seconds(alike, each) for each in gemm.passes}
        speed = gemm.flops * len(times) / sum(times.values())
        peak = BF16_PEAK_FLOPS.get(_kind(), math.inf)
        assert speed <= peak, f"{name}: {speed:.3g} FLOP/s, and the peak is {peak:.3g}"
        found[name] = {
            "rows": gemm.rows,
            "inputs": gemm.inputs,
            "outputs": gemm.outputs,
            "count": gemm.count,
            **times,
            "flops": speed,
        }
    return found


def _attention(shape: Attention, run: RunConfig) -> dict[str, Any]:
    """Returns the seconds and the speed of the model's own attention."""
    model, dtype = run.model, run.precision.compute
    B, T, S, H = shape.rows, shape.queries, shape.keys, shape.d_head
    q_BTNH, dy_BTNH = (_random((B, T, shape.heads, H), dtype, seed=i) for i in (0, 1))
    k_BSKH, v_BSKH = (_random((B, S, shape.kv_heads, H), dtype, seed=i) for i in (2, 3))
    segments_BT, segments_BS = (jnp.ones((B, n), jnp.int32) for n in (T, S))
    how = Scores(
        scale=model.attention_scale or H**-0.5,
        soft_cap=model.attention_soft_cap,
        window=model.sliding_window,
        reduce=run.precision.reduce,
    )

    def forward(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS):
        return attend(
            q_BTNH,
            k_BSKH,
            v_BSKH,
            q_segments_BT=segments_BT,
            kv_segments_BS=segments_BS,
            how=how,
            local=shape.local,
            implementation=model.attention,
        )

    def both(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, dy_BTNH):
        def of_qkv(*qkv):
            return forward(*qkv, segments_BT, segments_BS)

        out_BTNH, back = jax.vjp(of_qkv, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, back(dy_BTNH)

    inputs = (k_BSKH, v_BSKH, segments_BT, segments_BS)
    # What a loop works on is given away.
    one = _seconds(forward, jnp.copy(q_BTNH), *inputs)
    two = _seconds(both, q_BTNH, *inputs, dy_BTNH)
    return {
        "implementation": model.attention,
        "count": shape.count,
        "forward_s": one,
        "forward_backward_s": two,
        "forward_flops": shape.flops / one,
        "flops": 3 * shape.flops / two,
    }


def _copy() -> float:
    """Returns bytes read and written a second."""
    x = _random((COPY_BYTES // 4,), "float32")
    return 2 * COPY_BYTES / _seconds(jnp.negative, x)


def _optimizer(program: Program) -> float:
    """Returns the seconds of an optimizer step, of random gradients."""

    def update(params, opt_state, grads):
        sums = optim.as_sums(grads)._replace(weight=jnp.ones(()))
        whole = optim.as_sums(params)
        updates, opt_state = program.tx.update(sums, opt_state, whole)
        updates = cast(optim.Sums, updates).params
        return optax.apply_updates(params, updates), opt_state

    with jax.set_mesh(cast(Mesh, program.mesh)):
        state = timing.initial_state(program)
        params, opt_state = state.params, state.opt_state
        del state  # and with it what is frozen
        grads = jax.tree.map(jnp.copy, params)
        kept = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
        jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=kept)
        run = _compiled(jitted, params, opt_state, grads)
        calls = timing.parts(program)

        def step(carry):
            for _ in range(calls):
                carry = run(*carry, grads)
            return carry

        return _median(step, (params, opt_state))


_COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


def _collective(name: str, axis: str, grid: Mesh) -> float:
    """Returns the bus bandwidth in bytes a second, as NCCL's tests define it."""
    ways = grid.shape[axis]
    part = MESSAGE_BYTES // 2 // ways
    sizes = {"all_gather": (1, ways), "reduce_scatter": (ways, 1)}
    ins, outs = sizes.get(name, (ways, ways))
    op = {
        "all_gather": lambda x: jax.lax.all_gather(x, axis, tiled=True),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
        "all_reduce": lambda x: jax.lax.psum(x, axis),
    }[name]
    where = NamedSharding(grid, jax.P(axis))
    x, y = (
        jax.jit(jnp.ones, static_argnums=(0, 1), out_shardings=where)(
            (ways * part * times,), "bfloat16"
        )
        for times in (ins, outs)
    )
    loop = jax.shard_map(
        functools.partial(_looped, op),
        mesh=grid,
        in_specs=jax.P(axis),
        out_specs=jax.P(axis),
        check_vma=False,  # a gathered array is whole everywhere, and is not said to be
    )
    run = _compiled(jax.jit(loop, donate_argnums=(0, 1)), x, y)
    seconds = _median(lambda carry: run(*carry), (x, y)) / REPEATS
    wire = 2 * part * (ways - 1) * (2 if name == "all_reduce" else 1)
    return wire / seconds


def _seconds(op: Callable, first: jax.Array, *rest: jax.Array) -> float:
    """Returns the seconds of `op(first, *rest)`; `first` is given away."""
    outs = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
        jax.eval_shape(op, first, *rest),
    )
    jitted = jax.jit(functools.partial(_looped, op), donate_argnums=(0, 1))
    run = _compiled(jitted, first, outs, *rest)
    return _median(lambda carry: run(*carry, *rest), (first, outs)) / REPEATS


def _looped(op: Callable, first: jax.Array, outs: Any, *rest: jax.Array) -> Any:
    """Applies `op` again and again, each time to what the last time changed."""

    def again(_, carry):
        first, _ = carry
        outs = op(first, *rest)
        corners = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(outs)]
        # Bounded, lest numbers grow from call to call.
        corner = jnp.tanh(sum(corner.astype("float32") for corner in corners))
        first = first.at[(0,) * first.ndim].set(corner.astype(first.dtype))
        return first, outs

    return jax.lax.fori_loop(0, REPEATS, again, (first, outs))


def _median(call: Callable, carry: Any) -> float:
    """Returns the seconds of `call`, which takes and gives `carry`."""
    carry = jax.block_until_ready(call(carry))
    began = time.perf_counter()
    carry = jax.block_until_ready(call(carry))
    # Short calls follow each other without a wait, which would be measured with them.
    ahead = max(1, min(_AHEAD, int(_ENOUGH_S / (time.perf_counter() - began))))
    rounds = []
    for _ in range(_ROUNDS):
        began = time.perf_counter()
        for _ in range(ahead):
            carry = call(carry)
        jax.block_until_ready(carry)
        rounds.append((time.perf_counter() - began) / ahead)
    return float(np.median(rounds))


def _compiled(jitted: Any, *args: Any) -> Any:
    """Returns `jitted` compiled with the options that the step is compiled with."""
    options = COMPILER_OPTIONS.get(_kind())
    return jitted.lower(*args).compile(compiler_options=options)


def _kind() -> str:
    return jax.local_devices()[0].device_kind


def _random(shape: Sequence[int], dtype: str, seed: int = 0) -> jax.Array:
    """Returns normal numbers: a chip is faster on zeros, which take less power."""
    return jax.random.normal(jax.random.key(seed), tuple(shape), dtype)
