"""Matmuls of 8-bit numbers, for training: their formats, their scales, their gradients.

A tensor is divided by a scale and rounded; a product of two is multiplied by both of
theirs. Everything else keeps the format it has: what comes out is in `precision.compute`
and gradients of weights in `precision.reduce`, as of a matmul that is not quantised.

fp8: forward values are e4m3, gradients e5m2 (arXiv 2209.05433), one scale a tensor.
Scales are powers of two, so that to scale rounds nothing and a little error in what the
largest value is thought to be changes no bit. int8: a scale for each row and column of
the forward product; gradients are not quantised, since few integers are small enough.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scaletrain.config import PrecisionConfig

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_EXPONENTS = (-100, 100)  # of a scale: neither it nor 1 over it leaves float32


_GROWTH = 4.0
Groups = tuple[tuple[Float[Array, "..."], ...], ...]


class Scaled(NamedTuple):
    """8-bit values that stand for `values * scale`."""

    values: Array
    scale: Float[Array, "..."]


def amax(*xs: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the largest magnitude in all of `xs`, in float32."""
    tops = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in xs]
    return functools.reduce(jnp.maximum, tops)


def scale_of(top: Float[Array, ""], kind: Any) -> Float[Array, ""]:
    """Returns the least power of two that brings `top` into the range of `kind`.

    0, which says nothing of what is to come, gives 1.
    """
    fraction, exponent = jnp.frexp(top / float(jnp.finfo(kind).max))
    exponent = jnp.clip(exponent - (fraction == 0.5), *_EXPONENTS)
    return jnp.where(top > 0, jnp.ldexp(jnp.float32(1), exponent), 1)


def rounded(x: Float[Array, "..."], kind: Any, scale: Float[Array, ""]) -> Array:
    """Returns `x / scale` in `kind`; what is too large, but finite, becomes the largest.
    """
    x = x * (1 / scale).astype(x.dtype)
    most = float(jnp.finfo(kind).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x).astype(kind)


def met(values: Array) -> Float[Array, ""]:
    """Returns the largest magnitude of 8-bit values that `rounded` made.

    It reads a byte a value, where what they were made of has two or more, and comes
    after they are made: no kernel can both sum up and transpose. The largest number
    may stand for any larger one, and counts as `_GROWTH` times itself.
    """
    values = jax.lax.optimization_barrier(values)
    top = jnp.max(jnp.abs(values)).astype(jnp.float32)
    most = float(jnp.finfo(values.dtype).max)
    return jnp.where(top == most, _GROWTH * most, top)


def multiply(letters: str, a: Scaled, b: Scaled, dtype: Any, compute: Any) -> Array:
    """Returns einsum(letters, a, b) in `dtype`.

    A TPU multiplies the 8-bit values. For a GPU, XLA recognises values that are scaled
    before a product, and passes both scales to one library call; a CPU, which has no
    such units, emulates them by the same words.
    """
    a_dims, b_dims, out = letters.replace("->", ",").split(",")
    over = [dim for dim in a_dims if dim not in out]
    dims = (tuple(map(a_dims.index, over)), tuple(map(b_dims.index, over))), ((), ())

    def native(a: Scaled, b: Scaled) -> Array:
        y = jax.lax.dot_general(
            a.values, b.values, dims, preferred_element_type=jnp.float32
        )
        return (y * (a.scale * b.scale)).astype(dtype)

    def recognised(a: Scaled, b: Scaled) -> Array:
        wide = [x.values.astype(compute) * x.scale.astype(compute) for x in (a, b)]
        return jax.lax.dot_general(*wide, dims, preferred_element_type=dtype)

    return jax.lax.platform_dependent(a, b, tpu=native, default=recognised)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 4))
def project_fp8(
    letters: str,
    x: Float[Array, "..."],
    groups: Groups,
    expected: Groups,
    precision: PrecisionConfig,
) -> tuple[Float[Array, "..."], ...]:
    """Returns einsum(letters, x, w) of fp8 numbers for the matrices of each group.

    The matrices of a group lie side by side in one matmul.

    Args:
      expected: for each matrix the largest magnitudes, [2], that its input and the
        gradient of its output are scaled for; without any, they are what they turn out
        to be. Their "gradients" are the magnitudes that were met.
    """
    return _fp8_forward(letters, x, groups, expected, precision)[0]


def _quantised(x: Array, kind: Any, tops: Sequence[Array]) -> tuple[Scaled, Array]:
    """Returns `x` in `kind`, scaled for `tops`, and the largest magnitude in it."""
    if not tops:
        top = amax(x)
        scale = scale_of(top, kind)
        return Scaled((x * (1 / scale).astype(x.dtype)).astype(kind), scale), top
    scale = scale_of(functools.reduce(jnp.maximum, tops), kind)
    values = rounded(x, kind, scale)
    return Scaled(values, scale), scale * met(values)


def _fp8_forward(letters, x, groups, expected, precision):
    p = precision
    x_8, x_met = _quantised(x, FORWARD, [top[0] for each in expected for top in each])
    ws_8 = []
    for ws in groups:
        scale = scale_of(amax(*ws), FORWARD)
        parts = [(w * (1 / scale).astype(w.dtype)).astype(FORWARD) for w in ws]
        ws_8.append(Scaled(jnp.concatenate(parts, axis=-1), scale))
    ys = tuple(multiply(letters, x_8, w_8, p.compute, p.compute) for w_8 in ws_8)
    return ys, (x_8, ws_8, x_met, groups, expected)


def _fp8_backward(letters, precision, residuals, dys):
    x_8, ws_8, x_met, groups, expected = residuals
    x_dims, w_dims, out = letters.replace("->", ",").split(",")
    p = precision
    dx, dgroups, found = 0, [], []
    for dy, w_8, ws, tops in zip(dys, ws_8, groups, expected, strict=True):
        dy_8, dy_met = _quantised(dy, BACKWARD, [top[1] for top in tops])
        dx += multiply(f"{out},{w_dims}->{x_dims}", dy_8, w_8, p.compute, p.compute)
        dw = multiply(f"{x_dims},{out}->{w_dims}", x_8, dy_8, p.reduce, p.compute)
        dws = jax.lax.split(dw, [w.shape[-1] for w in ws], axis=dw.ndim - 1)
        dgroups.append(
            tuple(dw.astype(w.dtype) for dw, w in zip(dws, ws, strict=True))
        )
        found.append((jnp.stack([x_met, dy_met]),) * len(tops))
    return dx, tuple(dgroups), tuple(found)


project_fp8.defvjp(_fp8_forward, _fp8_backward)
