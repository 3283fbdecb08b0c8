"""Matmuls of 8-bit numbers, for training: their formats, scales and gradients.

A tensor is divided by a scale and rounded; a product of two tensors is multiplied by
both scales. Other formats stay: products are in `precision.compute` and gradients of
weights in `precision.gradients`, as in a matmul that is not quantised.

fp8: forward values are e4m3, gradients e5m2 (arXiv 2209.05433), one scale a tensor.
Scales are powers of two, so that scaling rounds nothing, and a small error in the
expected amax changes no bit. int8: a scale for each row and column of the forward
product; gradients are not quantised, since their range is too wide for the even steps
of integers.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from scaletrain.config import PrecisionConfig

FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
_EXPONENTS = (-100, 100)  # of a scale: neither it nor 1 over it leaves float32
HISTORY = 16  # optimizer steps whose amax values scale the next one
# A value at the format's maximum was clipped; its true size is not known. Counting it
# as 4 times as large lets four steps of clipping correct a scale that is 256 times too
# small.
_GROWTH = 4.0
Tree = Any
Groups = tuple[tuple[Float[Array, "..."], ...], ...]


class Amax(nnx.Variable):
    """The expected amax [2] of an fp8 matmul's input and of its output's gradient.

    Its "gradient" is the amax of this step, see `project_fp8`.
    """


def empty_history(amax: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns an amax history [HISTORY, ...] before the first step: all zero."""
    return jnp.zeros((HISTORY, *amax.shape))


def shifted(history: Tree) -> Tree:
    """Returns amax histories shifted by a step, with zero as the newest entry."""
    return jax.tree.map(lambda h: jnp.roll(h, 1, axis=0).at[0].set(0), history)


def expected(history: Tree) -> Tree:
    """Returns the largest amax of the steps before the newest."""
    return jax.tree.map(lambda h: jnp.max(h[1:], axis=0), history)


def recorded(history: Tree, amax: Tree, finite: Bool[Array, ""]) -> Tree:
    """Returns amax histories with `amax` in their newest entry.

    Args:
      history: amax histories [HISTORY, ...].
      amax: the amax values of this step.
      finite: whether all of them are; otherwise the newest entry stays.
    """

    def with_newest(history: jax.Array, amax: jax.Array) -> jax.Array:
        return history.at[0].max(jnp.where(finite, amax, 0))

    return jax.tree.map(with_newest, history, amax)


def all_finite(amax: Tree) -> Bool[Array, ""]:
    """Returns whether every amax is finite.

    Values clipped to the scale of earlier steps would hide an infinity from the loss.
    """
    leaves = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(amax)]
    return jnp.all(jnp.array(leaves)) if leaves else jnp.array(True)


class Scaled(NamedTuple):
    """8-bit values that stand for `values * scale`."""

    values: Array
    scale: Float[Array, "..."]


def amax(*xs: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the amax (largest magnitude) of all `xs`, in float32."""
    tops = [jnp.max(jnp.abs(x)).astype(jnp.float32) for x in xs]
    return functools.reduce(jnp.maximum, tops)


def scale_of(top: Float[Array, ""], kind: Any) -> Float[Array, ""]:
    """Returns the least power of two that brings the amax `top` into `kind`'s range.

    An amax of 0, as before the first step, gives a scale of 1.
    """
    fraction, exponent = jnp.frexp(top / float(jnp.finfo(kind).max))
    exponent = jnp.clip(exponent - (fraction == 0.5), *_EXPONENTS)
    return jnp.where(top > 0, jnp.ldexp(jnp.float32(1), exponent), 1)


def rounded(x: Float[Array, "..."], kind: Any, scale: Float[Array, ""]) -> Array:
    """Returns `x / scale` in `kind`: finite values are clipped to its largest number.

    Args:
      x: values.
      kind: an 8-bit format.
      scale: a power of two.
    """
    x = x * (1 / scale).astype(x.dtype)
    most = float(jnp.finfo(kind).max)
    return jnp.where(jnp.isfinite(x), jnp.clip(x, -most, most), x).astype(kind)


def amax_of_rounded(values: Array) -> Float[Array, ""]:
    """Returns the amax of 8-bit values that `rounded` returned, in their own units.

    Reading them costs a byte a value; reading the tensor before rounding costs two or
    more. A value at the format's maximum was clipped, and counts as `_GROWTH` times
    itself.
    """
    top = jnp.max(jnp.abs(values)).astype(jnp.float32)
    most = float(jnp.finfo(values.dtype).max)
    return jnp.where(top == most, _GROWTH * most, top)


def product(letters: str, a: Array, b: Array, dtype: Any) -> Array:
    """Returns einsum(letters, a, b) of operands whose formats may differ.

    Args:
      letters: such as "btd,df->btf".
      a: the first operand.
      b: the second operand.
      dtype: the format of sums and of the result.
    """
    a_dims, b_dims, out = letters.replace("->", ",").split(",")
    summed = [dim for dim in a_dims if dim not in out]
    dims = (
        (tuple(map(a_dims.index, summed)), tuple(map(b_dims.index, summed))),
        ((), ()),
    )
    return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)


def multiply(letters: str, a: Scaled, b: Scaled, dtype: Any, compute: Any) -> Array:
    """Returns einsum(letters, a, b) of fp8 values in `dtype`.

    A TPU multiplies the 8-bit values. For a GPU, XLA recognises operands that are
    scaled before a product, and passes both scales to one library call; a CPU, which
    has no such units, computes the same operations in `compute`.

    Args:
      letters: such as "btd,df->btf".
      a: the first operand.
      b: the second operand.
      dtype: the format of the result.
      compute: the format of scaled operands where there are no 8-bit units.
    """

    def native(a: Scaled, b: Scaled) -> Array:
        # The product is in `dtype` before it is scaled, so that it is summed over
        # devices in that format. It is rounded once: powers of two round nothing.
        y = product(letters, a.values, b.values, dtype)
        return y * (a.scale * b.scale).astype(dtype)

    def recognised(a: Scaled, b: Scaled) -> Array:
        x, y = (
            each.values.astype(compute) * each.scale.astype(compute) for each in (a, b)
        )
        return product(letters, x, y, dtype)

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

    The matrices of a group are concatenated for one matmul.

    Args:
      letters: the einsum of one product, such as "btd,df->btf".
      x: activations.
      groups: the matrices of each group, as they are stored.
      expected: for each matrix the expected amax, [2], of its input and of the gradient
        of its output, which set their scales; empty groups = the amax of this step.
        Their "gradients" are the amax values of this step.
      precision: the formats of the products and of the gradients.
    """
    return _fp8_forward(letters, x, groups, expected, precision)[0]


def _quantised(x: Array, kind: Any, tops: Sequence[Array]) -> tuple[Scaled, Array]:
    """Returns `x` in `kind` and its amax.

    Args:
      x: values.
      kind: an 8-bit format.
      tops: expected amax values that set the scale; () = the amax of `x`.
    """
    if not tops:
        top = amax(x)
        scale = scale_of(top, kind)
        values = _materialised((x * (1 / scale).astype(x.dtype)).astype(kind))
        return Scaled(values, scale), top
    scale = scale_of(functools.reduce(jnp.maximum, tops), kind)
    values = _materialised(rounded(x, kind, scale))
    return Scaled(values, scale), scale * amax_of_rounded(values)


def _materialised(values: Array) -> Array:
    """Returns `values`, materialised before their first use.

    A GPU's matmuls need them transposed as well. Without the barrier, XLA fuses
    quantising and transposing into one kernel at half the memory's speed: 7% of a step
    of 1.1B on an H100.
    """
    return jax.lax.optimization_barrier(values)


def _fp8_forward(letters, x, groups, expected, precision):
    p = precision
    x_8, x_amax = _quantised(x, FORWARD, [top[0] for each in expected for top in each])
    ws_8 = []
    for ws in groups:
        scale = scale_of(amax(*ws), FORWARD)
        low = [(w * (1 / scale).astype(w.dtype)).astype(FORWARD) for w in ws]
        ws_8.append(Scaled(jnp.concatenate(low, axis=-1), scale))
    ys = tuple(multiply(letters, x_8, w_8, p.compute, p.compute) for w_8 in ws_8)
    return ys, (x_8, ws_8, x_amax, groups, expected)


def _fp8_backward(letters, precision, residuals, dys):
    x_8, ws_8, x_amax, groups, expected = residuals
    x_dims, w_dims, out = letters.replace("->", ",").split(",")
    p = precision
    dx, dgroups, seen = 0, [], []
    for dy, w_8, ws, tops in zip(dys, ws_8, groups, expected, strict=True):
        dy_8, dy_amax = _quantised(dy, BACKWARD, [top[1] for top in tops])
        dx += multiply(f"{out},{w_dims}->{x_dims}", dy_8, w_8, p.compute, p.compute)
        dw = multiply(f"{x_dims},{out}->{w_dims}", x_8, dy_8, p.gradients, p.compute)
        dws = jax.lax.split(dw, [w.shape[-1] for w in ws], axis=dw.ndim - 1)
        dgroups.append(tuple(dw.astype(w.dtype) for dw, w in zip(dws, ws, strict=True)))
        seen.append((jnp.stack([x_amax, dy_amax]),) * len(tops))
    return dx, tuple(dgroups), tuple(seen)


project_fp8.defvjp(_fp8_forward, _fp8_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project_int8(
    letters: str,
    x: Float[Array, "..."],
    ws: tuple[Float[Array, "..."], ...],
    precision: PrecisionConfig,
) -> Float[Array, "..."]:
    """Returns einsum(letters, x, w) of int8 numbers, w being `ws` concatenated.

    Gradients are those of the product in `precision.compute`.

    Args:
      letters: such as "btd,df->btf".
      x: activations.
      ws: matrices as they are stored.
      precision: the formats of the product and of the gradients.
    """
    x_dims, w_dims, out = letters.replace("->", ",").split(",")
    x_8 = _by_row(x, [i for i, dim in enumerate(x_dims) if dim not in out])
    w = jnp.concatenate(ws, axis=-1)
    w_8 = _by_row(w, [i for i, dim in enumerate(w_dims) if dim not in out])
    y = product(letters, x_8.values, w_8.values, jnp.int32).astype(jnp.float32)
    rows, columns = x_8.scale.ndim, w_8.scale.ndim
    y *= x_8.scale.reshape(x_8.scale.shape + (1,) * columns)
    y *= w_8.scale.reshape((1,) * rows + w_8.scale.shape)
    return y.astype(precision.compute)


def _by_row(x: Array, summed: Sequence[int]) -> Scaled:
    """Returns `x` in int8 with one scale for all values along the dims `summed`."""
    top = jnp.max(jnp.abs(x), axis=summed, keepdims=True).astype(jnp.float32)
    scale = jnp.where(top > 0, top / 127, 1)
    values = jnp.round(x.astype(jnp.float32) / scale).astype(jnp.int8)
    return Scaled(values, jnp.squeeze(scale, summed))


def _int8_forward(letters, x, ws, precision):
    return project_int8(letters, x, ws, precision), (x, ws)


def _int8_backward(letters, precision, residuals, dy):
    x, ws = residuals
    x_dims, w_dims, out = letters.replace("->", ",").split(",")
    p = precision
    w = jnp.concatenate([w.astype(p.compute) for w in ws], axis=-1)
    dx = product(f"{out},{w_dims}->{x_dims}", dy, w, p.compute)
    dw = product(f"{x_dims},{out}->{w_dims}", x, dy, p.gradients)
    return dx, _split(dw, ws)


project_int8.defvjp(_int8_forward, _int8_backward)


def _split(dw: Array, ws: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the gradient of each of `ws` from the concatenated gradient `dw`."""
    parts = jax.lax.split(dw, [w.shape[-1] for w in ws], axis=dw.ndim - 1)
    return tuple(part.astype(w.dtype) for part, w in zip(parts, ws, strict=True))
