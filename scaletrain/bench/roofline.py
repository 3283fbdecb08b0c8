"""The speed of the hardware for the shapes of a run, measured on its devices.

Matmuls, attention and copies run on one device, in the shapes that it has in the run;
the optimizer and the collectives run on the mesh.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from scaletrain.bench import microbench, shapes
from scaletrain.bench.shapes import Attention, Gemm
from scaletrain.config import RunConfig
from scaletrain.hardware.chips import by_kind
from scaletrain.models.attention import Scores, attend
from scaletrain.program import Program, initial

COPY_BYTES = 2**28  # far more than the cache of any chip
# Of the larger of a collective's input and output on a device, as is customary.
MESSAGE_BYTES = 2**27


def measure(program: Program) -> dict[str, Any]:
    """Returns the measured speeds of the devices, in seconds, bytes/s and FLOP/s.

    `ideal` is the sum of a step that does only its matmuls, its attention and its
    optimizer update, at these speeds and one after the other.
    """
    run, mesh = program.run, cast(Mesh, program.mesh)
    gemms = _gemms(run)
    attention = {
        name: _attention(each, run) for name, each in shapes.attentions(run).items()
    }
    optimizer_s = _optimizer(program)
    total = {
        "gemms_s": sum(each["count"] * sum(_times(each)) for each in gemms.values()),
        "attention_s": sum(
            each["count"] * each["forward_backward_s"] for each in attention.values()
        ),
        "optimizer_s": optimizer_s,
    }
    flops = sum(
        each.count * each.flops * len(each.passes)
        for each in shapes.gemms(run).values()
    )
    return {
        "gemms": gemms,
        "gemm_flops": flops / total["gemms_s"],
        "attention": attention,
        "copy_bandwidth": _copy(),
        "optimizer_s": optimizer_s,
        "collectives": {
            axis: {name: _collective(name, axis, mesh) for name in _COLLECTIVES}
            for axis, size in mesh.shape.items()
            if size > 1
        },
        "ideal": total | {"step_s": sum(total.values())},
    }


def _times(gemm: dict[str, Any]) -> list[float]:
    """Returns the seconds of the passes of a measured matmul."""
    return [gemm[f"{name}_s"] for name in _PASSES if f"{name}_s" in gemm]


# Einsums of the passes: rows m, inputs k, outputs n.
_PASSES = {"forward": "mk,kn->mn", "dgrad": "mn,kn->mk", "wgrad": "mk,mn->kn"}


def _gemms(run: RunConfig) -> dict[str, Any]:
    """Returns the seconds and the speed of each matmul; equal shapes run only once."""

    @functools.cache
    def seconds(gemm: Gemm, name: str) -> float:
        sizes = {"m": gemm.rows, "k": gemm.inputs, "n": gemm.outputs}
        letters = _PASSES[name]
        inputs, _ = letters.split("->")
        x, y = (
            _random([sizes[letter] for letter in dims], run.precision.compute)
            for dims in inputs.split(",")
        )
        p = run.precision
        dtype = p.gradients if name == "wgrad" else p.compute
        dot = functools.partial(jnp.einsum, letters, preferred_element_type=dtype)
        return microbench.seconds(dot, x, y)

    chip, record = by_kind(microbench.kind()), {}
    for name, gemm in shapes.gemms(run).items():
        # The count does not change the time: equal shapes then share a cache entry.
        single = dataclasses.replace(gemm, count=1)
        times = {f"{each}_s": seconds(single, each) for each in gemm.passes}
        speed = gemm.flops * len(times) / sum(times.values())
        peak = chip.peak_flops if chip else math.inf
        # A higher speed would mean that the compiler removed some of the work.
        assert speed <= peak, f"{name}: {speed:.3g} FLOP/s, and the peak is {peak:.3g}"
        record[name] = {
            "rows": gemm.rows,
            "inputs": gemm.inputs,
            "outputs": gemm.outputs,
            "count": gemm.count,
            **times,
            "flops": speed,
        }
    return record


def _attention(shape: Attention, run: RunConfig) -> dict[str, Any]:
    """Returns the seconds and the speed of the model's own attention."""
    model, dtype = run.model, run.precision.compute
    B, T, S, H = shape.rows, shape.queries, shape.keys, shape.d_head
    q_BTNH, dy_BTNH = (_random((B, T, shape.heads, H), dtype, seed=i) for i in (0, 1))
    k_BSKH, v_BSKH = (_random((B, S, shape.kv_heads, H), dtype, seed=i) for i in (2, 3))
    segments_BT, segments_BS = (jnp.ones((B, n), jnp.int32) for n in (T, S))
    scores = Scores(
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
            scores=scores,
            local=shape.local,
            implementation=model.attention,
        )

    def forward_backward(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS, dy_BTNH):
        def of_qkv(q_BTNH, k_BSKH, v_BSKH):
            return forward(q_BTNH, k_BSKH, v_BSKH, segments_BT, segments_BS)

        out_BTNH, vjp = jax.vjp(of_qkv, q_BTNH, k_BSKH, v_BSKH)
        return out_BTNH, vjp(dy_BTNH)

    inputs = (k_BSKH, v_BSKH, segments_BT, segments_BS)
    # A copy, since the first argument is donated.
    forward_s = microbench.seconds(forward, jnp.copy(q_BTNH), *inputs)
    both_s = microbench.seconds(forward_backward, q_BTNH, *inputs, dy_BTNH)
    return {
        "implementation": model.attention,
        "count": shape.count,
        "forward_s": forward_s,
        "forward_backward_s": both_s,
        "forward_flops": shape.flops / forward_s,
        "flops": 3 * shape.flops / both_s,
    }


def _copy() -> float:
    """Returns the bandwidth of a copy: bytes read and written in a second."""
    x = _random((COPY_BYTES // 4,), "float32")
    return 2 * COPY_BYTES / microbench.seconds(jnp.negative, x)


def _optimizer(program: Program) -> float:
    """Returns the seconds of an optimizer update on the mesh.

    The parameters serve as gradients, in the format that gradients have in training.
    """

    def update(params, opt_state, grads):
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        one = jnp.ones(())
        updates, opt_state = program.tx.update(
            grads, opt_state, params, loss=one, tokens=one, finite=jnp.array(True)
        )
        return optax.apply_updates(params, updates), opt_state

    with jax.set_mesh(cast(Mesh, program.mesh)):
        state = initial(program, with_frozen=True)
        params, opt_state = state.params, state.opt_state
        del state  # frees the memory of frozen weights
        # Sums over micro-batches have the format of the parameters.
        is_sum = program.run.accumulate_steps > 1
        low = program.run.precision.gradients
        grads = jax.tree.map(lambda p: jnp.array(p, p.dtype if is_sum else low), params)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
        jitted = jax.jit(update, donate_argnums=(0, 1), out_shardings=shardings)
        run = microbench.compiled(jitted, params, opt_state, grads)
        return microbench.median(lambda carry: run(*carry, grads), (params, opt_state))


_COLLECTIVES = ("all_gather", "reduce_scatter", "all_reduce")


def _collective(name: str, axis: str, mesh: Mesh) -> float:
    """Returns the bus bandwidth in bytes a second, as NCCL's tests define it."""
    num_shards = mesh.shape[axis]
    shard = MESSAGE_BYTES // 2 // num_shards  # bfloat16 values
    # Shards of the input and of the output that each device has.
    sizes = {"all_gather": (1, num_shards), "reduce_scatter": (num_shards, 1)}
    ins, outs = sizes.get(name, (num_shards, num_shards))
    op = {
        "all_gather": lambda x: jax.lax.all_gather(x, axis, tiled=True),
        "reduce_scatter": lambda x: jax.lax.psum_scatter(x, axis, tiled=True),
        "all_reduce": lambda x: jax.lax.psum(x, axis),
    }[name]
    sharding = NamedSharding(mesh, jax.P(axis))
    x, y = (
        jax.jit(jnp.ones, static_argnums=(0, 1), out_shardings=sharding)(
            (num_shards * shard * size,), "bfloat16"
        )
        for size in (ins, outs)
    )
    loop = jax.shard_map(
        functools.partial(microbench.looped, op),
        mesh=mesh,
        in_specs=jax.P(axis),
        out_specs=jax.P(axis),
        check_vma=False,  # the result of all_gather is replicated, but not typed so
    )
    run = microbench.compiled(jax.jit(loop, donate_argnums=(0, 1)), x, y)
    seconds = microbench.median(lambda carry: run(*carry), (x, y)) / microbench.REPEATS
    # Bytes that each device sends; an all-reduce is a reduce-scatter and an all-gather.
    sent = 2 * shard * (num_shards - 1) * (2 if name == "all_reduce" else 1)
    return sent / seconds


def _random(shape: Sequence[int], dtype: str, seed: int = 0) -> jax.Array:
    """Returns normal numbers; zeros take less power and would be faster."""
    return jax.random.normal(jax.random.key(seed), tuple(shape), dtype)
