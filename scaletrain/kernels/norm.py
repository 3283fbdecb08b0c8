"""RMSNorm of a residual stream on GPUs; each value is read once.

XLA reads a row once to sum its squares and again to scale it, copies the stream before
a matmul adds to it, and does the same in the backward pass. One kernel of this module
adds a branch to the stream and normalises the sum; another computes the gradient of
both.
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
# Of the backward kernel; each sums the scale's gradient over its own rows, and XLA adds
# these partial sums.
_PROGRAMS = 1024


def supports(shape_BTD: tuple[int, ...], reduce: str) -> bool:
    """Whether the mesh's devices run `add_norm` on a stream of this shape.

    Args:
      reduce: format of the sums, as `precision.reduce`.
    """
    is_even = sharding.shard_shape(shape_BTD[:2], "batch", "tokens") is not None
    fits = shape_BTD[-1] <= LARGEST and reduce == "float32"
    return sharding.platform() == "gpu" and is_even and fits


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def add_norm(
    x_BTD: Float[Array, "B T D"],
    branch_BTD: Float[Array, "B T D"] | None,
    scale_D: Float[Array, " D"],
    eps: float,
    interpret: bool = False,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns s = x + branch, and s / rms(s) * scale (arXiv 1910.07467).

    Squares are summed in float32. Operations that follow must read the stream from the
    first result: one kernel then adds its gradient to that of the norm.

    Args:
      x_BTD: the residual stream.
      branch_BTD: added to the stream; None = nothing to add.
      scale_D: in float32.
      eps: added to the mean of the squares.
      interpret: runs the kernels in Pallas' interpreter, for tests without a GPU.
    """
    return _forward(x_BTD, branch_BTD, scale_D, eps, interpret)[0]


def _forward(x_BTD, branch_BTD, scale_D, eps, interpret):
    is_plain = branch_BTD is None
    streams = (x_BTD,) if is_plain else (x_BTD, branch_BTD)
    local = functools.partial(_forward_local, eps, interpret)
    outs = ("BTD", "BT") if is_plain else ("BTD", "BT", "BTD")
    dims = ("BTD",) * len(streams)
    run = sharding.on_local_rows(local, (*dims, "D"), outs)
    normed_BTD, rate_BT, *sums = run(*streams, scale_D)
    sum_BTD = x_BTD if is_plain else sums[0]
    return (sum_BTD, normed_BTD), (sum_BTD, rate_BT, scale_D, is_plain)


def _backward(eps, interpret, residuals, cotangents):
    sum_BTD, rate_BT, scale_D, is_plain = residuals
    local = functools.partial(_backward_local, interpret)
    streams = (*cotangents, sum_BTD, rate_BT)
    dims = "BTD", "BTD", "BTD", "BT", "D"
    run = sharding.on_local_rows(local, dims, ("BTD", "PD"))
    dx_BTD, dscale_PD = run(*streams, scale_D)
    return dx_BTD, None if is_plain else dx_BTD, jnp.sum(dscale_PD, axis=0)


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
    """Returns the columns of a block for a row of D values, and its number of warps."""
    block = pl.next_power_of_2(D)
    return block, max(1, min(16, block // 512))


def _forward_local(eps, interpret, *arrays):
    """Returns the normalised stream and its 1 / rms; with a branch also the sum.

    Args:
      arrays: the stream, the branch if there is one, and the scale.
    """
    B, T, D = arrays[0].shape
    flat = [each.reshape(B * T, D) for each in arrays[:-1]]
    block, warps = _block(D)
    stream = jax.ShapeDtypeStruct((B * T, D), flat[0].dtype)
    outs = [stream, jax.ShapeDtypeStruct((B * T,), jnp.float32), stream]
    kernel = functools.partial(_add_norm_forward, D=D, eps=eps, block=block)
    results = _call(kernel, B * T, outs[: 1 + len(flat)], warps, interpret)(
        *flat, arrays[-1]
    )
    return tuple(each.reshape(B, T, *each.shape[1:]) for each in results)


def _add_norm_forward(*refs, D, eps, block):
    """Kernel of one row: adds the streams, stores their sum, normalises it.

    Args:
      refs: as the arguments of `_forward_local`, then as its results.
    """
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
        # The norm is of the rounded sum, which the model and the backward pass read.
        stored = total.astype(ref.dtype)
        plgpu.store(ref.at[row, columns], stored, mask=inside)
        total = stored.astype(jnp.float32)
    rate = jax.lax.rsqrt(jnp.sum(total * total) / D + eps)
    rate_ref[row] = rate
    scale = plgpu.load(scale_ref.at[columns], mask=inside, other=0.0)
    normed = (total * rate * scale).astype(normed_ref.dtype)
    plgpu.store(normed_ref.at[row, columns], normed, mask=inside)


def _backward_local(interpret, dsum_BTD, dnormed_BTD, sum_BTD, rate_BT, scale_D):
    """Returns the gradient of the stream, and partial sums of that of the scale."""
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
    """Kernel of every n-th row, where n is the number of programs."""
    first, stride = pl.program_id(0), dscale_ref.shape[0]
    columns = jnp.arange(block)
    inside = columns < D
    scale = plgpu.load(scale_ref.at[columns], mask=inside, other=0.0)

    def add_row(i, dscale):
        row = first + i * stride

        def read(ref):
            values = plgpu.load(ref.at[row, columns], mask=inside, other=0.0)
            return values.astype(jnp.float32)

        rate, dnormed = rate_ref[row], read(dnormed_ref)
        unit = read(sum_ref) * rate
        dunit = dnormed * scale
        dx = rate * (dunit - unit * (jnp.sum(dunit * unit) / D)) + read(dsum_ref)
        plgpu.store(dx_ref.at[row, columns], dx.astype(dx_ref.dtype), mask=inside)
        return dscale + dnormed * unit

    count = (rows - first + stride - 1) // stride
    dscale = jax.lax.fori_loop(0, count, add_row, jnp.zeros(block, jnp.float32))
    plgpu.store(dscale_ref.at[first, columns], dscale, mask=inside)
