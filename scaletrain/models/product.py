"""Products with matrices, in the formats of the precision policy, and their gradients.

Matrices are stored in `precision.params`, multiplied in `precision.compute`, and their
gradients leave their matmuls, and are summed over devices, in `precision.gradients`.
Products of 8-bit numbers are in `quantised`.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scaletrain import sharding
from scaletrain.config import PrecisionConfig
from scaletrain.sharding import constrain


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def project(
    letters: str,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    precision: PrecisionConfig,
) -> Float[Array, "..."]:
    """Returns einsum(letters, x, w) in the compute precision.

    The gradient of `w` leaves its matmul in `precision.gradients`, and is summed over
    devices in that format; automatic differentiation would do so in `compute`.

    Args:
      letters: an einsum of two operands, such as "btd,df->btf".
      x: activations.
      w: the matrix as it is stored, in `precision.params`.
      precision: the formats of the product and of the gradients.
    """
    return _project_forward(letters, x, w, precision)[0]


def _project_forward(letters, x, w, precision):
    low = w.astype(precision.compute)
    return jnp.einsum(letters, x, low), (x, w, gathered(low))


def gathered(low: Float[Array, "..."]) -> Float[Array, "..."] | None:
    """Returns the residual for the backward pass of a matrix in the compute precision.

    That is the matrix itself under FSDP, where keeping the gathered one saves a second
    all-gather (unless a scan over layers or remat keeps the shards); otherwise None,
    and the backward pass casts the stored weight again.
    """
    return low if sharding.mesh_axes("embed") else None


def _project_backward(letters, precision, residuals, dy):
    x, w, low = residuals
    low = w.astype(precision.compute) if low is None else low
    dx, dw = gradients(letters, precision, x, low, dy)
    return dx, dw.astype(w.dtype)


def gradients(
    letters: str,
    precision: PrecisionConfig,
    x: Float[Array, "..."],
    w: Float[Array, "..."],
    dy: Float[Array, "..."],
) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
    """Returns the gradients of `x` and of `w` under y = einsum(letters, x, w).

    Args:
      letters: the einsum of the forward pass.
      precision: the format of the gradient of `w` is `precision.gradients`.
      x: the first operand, activations.
      w: the second operand, the matrix in the compute precision.
      dy: the gradient of y.
    """
    inputs, out = letters.split("->")
    x_dims, w_dims = inputs.split(",")
    dx = jnp.einsum(f"{out},{w_dims}->{x_dims}", dy, w)
    dw = jnp.einsum(
        f"{x_dims},{out}->{w_dims}", x, dy, preferred_element_type=precision.gradients
    )
    return dx, dw


project.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def project_all(
    x_BTD: Float[Array, "B T D"],
    ws: tuple[Float[Array, "D _"], ...],
    precision: PrecisionConfig,
) -> Float[Array, "B T F"]:
    """Returns the product of `x` with `ws`, concatenated, by one matmul.

    Args:
      x_BTD: activations.
      ws: matrices as they are stored; F is the sum of their columns.
      precision: see `project`.
    """
    return _project_all_forward(x_BTD, ws, precision)[0]


def _concatenated(ws: tuple[Array, ...], precision: PrecisionConfig) -> Array:
    return jnp.concatenate([w.astype(precision.compute) for w in ws], axis=1)


def split_columns(y: Array, ws: tuple[Array, ...]) -> tuple[Array, ...]:
    """Returns the slices of the last dim of `y` that belong to each of `ws`."""
    return tuple(jax.lax.split(y, [w.shape[1] for w in ws], axis=y.ndim - 1))


def _project_all_forward(x_BTD, ws, precision):
    low_DF = _concatenated(ws, precision)
    y_BTF = jnp.einsum("btd,df->btf", x_BTD, low_DF)
    return y_BTF, (x_BTD, ws, gathered(low_DF))


def _project_all_backward(precision, residuals, dy_BTF):
    x_BTD, ws, low_DF = residuals
    low_DF = _concatenated(ws, precision) if low_DF is None else low_DF
    dx_BTD, dw_DF = gradients("btd,df->btf", precision, x_BTD, low_DF, dy_BTF)
    dw_DF = constrain(dw_DF, "embed", "replicated", reduce_first=True)
    dws = zip(split_columns(dw_DF, ws), ws, strict=True)
    return dx_BTD, tuple(dw.astype(w.dtype) for dw, w in dws)


project_all.defvjp(_project_all_forward, _project_all_backward)
