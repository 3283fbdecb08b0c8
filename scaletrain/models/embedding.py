"""Looking up the rows of a table that is cut over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scaletrain import sharding
from scaletrain.config import PrecisionConfig


class Cut(NamedTuple):
    """The mesh axes that a table is cut over, and those that cut tokens alone."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    others: tuple[str, ...]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(
    table_VD: Float[Array, "V D"],
    tokens_BT: Int[Array, "B T"],
    axis: str,
    precision: PrecisionConfig,
) -> Float[Array, "B T D"]:
    """Returns the rows of `table_VD` in the compute precision.

    Written device by device: each looks up the columns that it holds, for the
    sequences of all devices that hold the other columns, and no table travels. The
    gradient adds many rows into few, in `precision.reduce` and, over devices, in
    `precision.gradients`.

    Args:
      axis: the logical axis of the table's rows; its columns are `embed`.
    """
    return _spread(_looked_up, precision, axis, "vd,bt->btd")(table_VD, tokens_BT)


def _forward(table_VD, tokens_BT, axis, precision):
    return look_up(table_VD, tokens_BT, axis, precision), (table_VD, tokens_BT)


def _backward(axis, precision, residuals, dx_BTD):
    added = _spread(_added, precision, axis, "vd,bt,btd->vd")
    return added(*residuals, dx_BTD), None


look_up.defvjp(_forward, _backward)


def _spread(
    here: Callable[..., Array], precision: PrecisionConfig, axis: str, letters: str
) -> Callable[..., Array]:
    """Returns `here` on every device, told what its arguments are cut over."""
    rows, columns = sharding.mesh_axes(axis), sharding.mesh_axes("embed")
    batch = sharding.mesh_axes("batch", "tokens")
    cut = Cut(rows, columns, tuple(name for name in batch if name not in columns))
    specs = {
        "vd": sharding.spec(axis, "embed"),
        "bt": sharding.spec("batch", "tokens"),
        "btd": sharding.spec("batch", "tokens", "residual"),
    }
    inputs, out = letters.split("->")
    return sharding.by_device(
        functools.partial(here, cut, precision),
        tuple(specs[each] for each in inputs.split(",")),
        specs[out],
    )


def _looked_up(
    cut: Cut,
    precision: PrecisionConfig,
    table_vd: Float[Array, "v d"],
    tokens_bT: Int[Array, "b T"],
) -> Float[Array, "b T D"]:
    """Returns this device's sequences, from all parts of the table."""
    own_BT, rows_BT = _own(cut, table_vd, tokens_bT)
    x_BTd = table_vd.astype(precision.compute)[rows_BT]
    if cut.rows:
        x_BTd = jax.lax.psum(jnp.where(own_BT[..., None], x_BTd, 0), cut.rows)
    if not cut.columns:
        return x_BTd
    return jax.lax.all_to_all(x_BTd, cut.columns, 0, 2, tiled=True)


def _added(
    cut: Cut,
    precision: PrecisionConfig,
    table_vd: Float[Array, "v d"],
    tokens_bT: Int[Array, "b T"],
    dx_bTD: Float[Array, "b T D"],
) -> Float[Array, "v d"]:
    """Returns the gradient of this device's part of the table, from all sequences."""
    own_BT, rows_BT = _own(cut, table_vd, tokens_bT)
    dx_BTd = dx_bTD
    if cut.columns:
        dx_BTd = jax.lax.all_to_all(dx_bTD, cut.columns, 2, 0, tiled=True)
    dx_BTd = dx_BTd.astype(precision.reduce)
    if cut.rows:
        dx_BTd = jnp.where(own_BT[..., None], dx_BTd, 0)
    sums_vd = jnp.zeros(table_vd.shape, precision.reduce).at[rows_BT].add(dx_BTd)
    if cut.others:
        sums_vd = jax.lax.psum(sums_vd.astype(precision.gradients), cut.others)
    return sums_vd.astype(table_vd.dtype)


def _own(
    cut: Cut, table_vd: Float[Array, "v d"], tokens_bT: Int[Array, "b T"]
) -> tuple[Any, Int[Array, "B T"]]:
    """Returns which tokens' rows are in this part of the table, and where."""
    tokens_BT = tokens_bT
    if cut.columns:
        tokens_BT = jax.lax.all_gather(tokens_bT, cut.columns, axis=0, tiled=True)
    if not cut.rows:
        return None, tokens_BT
    v = table_vd.shape[0]
    rows_BT = tokens_BT - jax.lax.axis_index(cut.rows) * v
    return (rows_BT >= 0) & (rows_BT < v), jnp.clip(rows_BT, 0, v - 1)
