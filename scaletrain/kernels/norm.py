"""RMSNorm of a residual stream on GPUs, each value read once.

XLA reads a row once to sum its squares and again to scale it, copies the stream before
a matmul adds to it, and does the same backwards. Here one kernel adds a branch to the
stream and normalises the sum; another gives the gradient of both.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from scaletrain import sharding

LARGEST = 16_384  # values of a row that fit into the registers of one block
_PROGRAMS = 1024  # of the backward kernel; each adds up the rows it sees


def supports(shape_BTD: tuple[int, ...], reduce: str) -> bool:
    """Whether the mesh's devices run `add_norm` on a stream of this shape.

    Args:
      reduce: format of the sums, as `precision.reduce`.
    """
    even = sharding.shard_shape(shape_BTD[:2], "batch", "tokens") is not None
    fits = shape_BTD[-1] <= LARGEST and reduce == "float32"
    return sharding.platform() == "gpu" and even and fits


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_norm(
    x_BTD: Float[Array, "B T D"],
    branch_BTD: Float[Array, "B T D"] | None,
    scale_D: Float[Array, " D"],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns s = x + branch, and s / rms(s) * scale (arXiv 1910.07467).

    Squares are summed in float32; `scale_D` is float32. The first result carries the
    gradient of whoever reads the stream, so that both gradients meet in one pass.
    """
    return _forward(x_BTD, branch_BTD, scale_D, eps, interpret)[0]


def _forward(x_BTD, branch_BTD, scale_D, eps, interpret):
    alone = branch_BTD is None
    streams = (x_BTD,) if alone else (x_BTD, branch_BTD)
    local = functools.partial(_forward_local, eps, interpret)
    outs = ("BTD", "BT") if alone else ("BTD", "BT", "BTD")
    dims = ("BTD",) * len(streams)
    run = sharding.on_local_rows(local, (*dims, "D"), outs)
    normed_BTD, rate_BT, *sums = run(*streams, scale_D)
    sum_BTD = x_BTD if alone else sums[0]
    return (sum_BTD, normed_BTD), (sum_BTD, rate_BT, scale_D, alone)


def _backward(eps, interpret, residuals, cotangents):
    sum_BTD, rate_BT, scale_D, alone = residuals
    local = functools.partial(_backward_local, interpret)
    streams = (*cotangents, sum_BTD, rate_BT)
    dims = "BTD", "BTD", "BTD", "BT", "D"
    run = sharding.on_local_rows(local, dims, ("BTD", "PD"))
    dx_BTD, dscale_PD = run(*streams, scale_D)
    return dx_BTD, None if alone else dx_BTD, jnp.sum(dscale_PD, axis=0)


add_norm.defvjp(_forward, _backward)


def _call(
    kernel: functools.partial[None],
    programs: int,
    outs: Any,
    warps: int,
    interpret: bool,
) -> Callable[..., Any]:
    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=outs,
        compiler_params=plgpu.CompilerParams(num_warps=warps),
        interpret=interpret,
        name=kernel.func.__name__.strip("_"),
    )


def _block(D: int) -> tuple[int, int]:
    """Returns the columns of a block that holds a row of D, and its warps."""
    block = pl.next_power_of_2(D)
    return block, max(1, min(16, block // 512))


def _forward_local(eps, interpret, *arrays):
    """Returns the normalised stream, its 1 / rms and, of two streams, their sum."""
    B, T, D = arrays[0].shape
    flat = [each.reshape(B * T, D) for each in arrays[:-1]]
    block, warps = _block(D)
    stream = jax.ShapeDtypeStruct((B * T, D), flat[0].dtype)
    outs = [stream, jax.ShapeDtypeStruct((B * T,), jnp.float32), stream]
    kernel = functools.partial(_add_norm_forward, D=D, eps=eps, block=block)
    found = _call(kernel, B * T, outs[: 1 + len(flat)], warps, interpret)(
        *flat, arrays[-1]
    )
    return tuple(each.reshape(B, T, *each.shape[1:]) for each in found)


def _add_norm_forward(*refs, D, eps, block):
    """Takes one row."""
    half = len(refs) // 2
    streams, scale_ref = refs[: half - 1], refs[half - 1]
    normed_ref, rate_ref, *sum_refs = refs[half:]
    row, columns = pl.program_id(0), jnp.arange(block)
    inside = columns < D

    def read(ref):
        return plgpu.load(ref.at[row, columns], mask=inside, other=0.0)

    total = jnp.zeros(block, jnp.float32)
    for ref in streams:
        total += read(ref).astype(jnp.float32)
    for ref in sum_refs:
        # The stream is what is stored: the norm is of that.
        stored = total.astype(ref.dtype)
        plgpu.store(ref.at[row, columns], stored, mask=inside)
        total = stored.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.sum(total * total) / D + eps)
    rate_ref[row] = rate
    scale = plgpu.load(scale_ref.at[columns], mask=inside, other=0.0)
    normed = (total * rate * scale).astype(normed_ref.dtype)
    plgpu.store(normed_ref.at[row, columns], normed, mask=inside)


def _backward_local(interpret, dsum_BTD, dnormed_BTD, sum_BTD, rate_BT, scale_D):
    """Returns the stream's gradient, and the scale's as a sum for each program."""
    B, T, D = sum_BTD.shape
    block, warps = _block(D)
    programs = min(_PROGRAMS, B * T)
    kernel = functools.partial(_add_norm_backward, D=D, rows=B * T, block=block)
    outs = [
        jax.ShapeDtypeStruct((B * T, D), sum_BTD.dtype),
        jax.ShapeDtypeStruct((programs, D), jnp.float32),
    ]
    flat = (each.reshape(B * T, D) for each in (dsum_BTD, dnormed_BTD, sum_BTD))
    dx_RD, dscale_PD = _call(kernel, programs, outs, warps, interpret)(
        *flat, rate_BT.reshape(B * T), scale_D
    )
    return dx_RD.reshape(B, T, D), dscale_PD


def _add_norm_backward(
    dsum_ref, dnormed_ref, sum_ref, rate_ref, scale_ref, dx_ref, dscale_ref,
    *, D, rows, block,
):  # fmt: skip
    """Takes every n-th row, n being the number of programs."""
    first, step = pl.program_id(0), dscale_ref.shape[0]
    columns = jnp.arange(block)
    inside = columns < D
    scale = plgpu.load(scale_ref.at[columns], mask=inside, other=0.0)

    def take(i, dscale):
        row = first + i * step

        def read(ref):
            here = plgpu.load(ref.at[row, columns], mask=inside, other=0.0)
            return here.astype(jnp.float32)

        rate, dnormed = rate_ref[row], read(dnormed_ref)
        unit = read(sum_ref) * rate
        pull = dnormed * scale
        dx = rate * (pull - unit * (jnp.sum(pull * unit) / D)) + read(dsum_ref)
        plgpu.store(dx_ref.at[row, columns], dx.astype(dx_ref.dtype), mask=inside)
        return dscale + dnormed * unit

    count = (rows - first + step - 1) // step
    dscale = jax.lax.fori_loop(0, count, take, jnp.zeros(block, jnp.float32))
    plgpu.store(dscale_ref.at[first, columns], dscale, mask=inside)
