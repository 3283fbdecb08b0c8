"""Embedding lookup in a table that is sharded over the mesh."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from scaletrain import sharding
from scaletrain.config import PrecisionConfig


class TableAxes(NamedTuple):
    """The mesh axes that shard a table, and those that shard only tokens."""

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

    Each device looks up its own columns, for the sequences of all devices that have the
    other columns, so that tokens and rows are exchanged and the table never is. The
    gradient sums rows of equal tokens in `precision.reduce` and, over devices, in
    `precision.gradients`.

    Args:
      table_VD: the table as it is stored.
      tokens_BT: row numbers: token ids or positions.
      axis: the logical axis of the table's rows; its columns are `embed`.
      precision: formats.
    """
    return _sharded(_local_rows, precision, axis, "vd,bt->btd")(table_VD, tokens_BT)


def _forward(table_VD, tokens_BT, axis, precision):
    return look_up(table_VD, tokens_BT, axis, precision), (table_VD, tokens_BT)


def _backward(axis, precision, residuals, dx_BTD):
    added = _sharded(_local_gradient, precision, axis, "vd,bt,btd->vd")
    return added(*residuals, dx_BTD), None


look_up.defvjp(_forward, _backward)


def _sharded(
    local: Callable[..., Array], precision: PrecisionConfig, axis: str, letters: str
) -> Callable[..., Array]:
    """Returns `local` run on every device's shards, given the table's mesh axes.

    Args:
      local: a function of (table_axes, precision, shards ...).
      precision: formats.
      axis: the logical axis of the table's rows.
      letters: the dims of inputs and output, such as "vd,bt->btd".
    """
    rows, columns = sharding.mesh_axes(axis), sharding.mesh_axes("embed")
    batch = sharding.mesh_axes("batch", "tokens")
    table_axes = TableAxes(
        rows, columns, tuple(name for name in batch if name not in columns)
    )
    specs = {
        "vd": sharding.spec(axis, "embed"),
        "bt": sharding.spec("batch", "tokens"),
        "btd": sharding.spec("batch", "tokens", "residual"),
    }
    inputs, out = letters.split("->")
    return sharding.by_device(
        functools.partial(local, table_axes, precision),
        tuple(specs[each] for each in inputs.split(",")),
        specs[out],
    )


def _local_rows(
    table_axes: TableAxes,
    precision: PrecisionConfig,
    table_vd: Float[Array, "v d"],
    tokens_bT: Int[Array, "b T"],
) -> Float[Array, "b T D"]:
    """Returns the rows for this device's sequences, from all shards of the table."""
    own_BT, rows_BT = _own(table_axes, table_vd, tokens_bT)
    x_BTd = table_vd.astype(precision.compute)[rows_BT]
    if table_axes.rows:
        x_BTd = jax.lax.psum(jnp.where(own_BT[..., None], x_BTd, 0), table_axes.rows)
    if not table_axes.columns:
        return x_BTd
    return jax.lax.all_to_all(x_BTd, table_axes.columns, 0, 2, tiled=True)


def _local_gradient(
    table_axes: TableAxes,
    precision: PrecisionConfig,
    table_vd: Float[Array, "v d"],
    tokens_bT: Int[Array, "b T"],
    dx_bTD: Float[Array, "b T D"],
) -> Float[Array, "v d"]:
    """Returns the gradient of this device's shard of the table, from all sequences."""
    own_BT, rows_BT = _own(table_axes, table_vd, tokens_bT)
    dx_BTd = dx_bTD
    if table_axes.columns:
        dx_BTd = jax.lax.all_to_all(dx_bTD, table_axes.columns, 2, 0, tiled=True)
    dx_BTd = dx_BTd.astype(precision.reduce)
    if table_axes.rows:
        dx_BTd = jnp.where(own_BT[..., None], dx_BTd, 0)
    sums_vd = jnp.zeros(table_vd.shape, precision.reduce).at[rows_BT].add(dx_BTd)
    if table_axes.others:
        sums_vd = jax.lax.psum(sums_vd.astype(precision.gradients), table_axes.others)
    return sums_vd.astype(table_vd.dtype)


def _own(
    table_axes: TableAxes, table_vd: Float[Array, "v d"], tokens_bT: Int[Array, "b T"]
) -> tuple[Any, Int[Array, "B T"]]:
    """Returns a mask of the tokens in this shard (None = all), and their rows in it."""
    tokens_BT = tokens_bT
    if table_axes.columns:
        tokens_BT = jax.lax.all_gather(
            tokens_bT, table_axes.columns, axis=0, tiled=True
        )
    if not table_axes.rows:
        return None, tokens_BT
    v = table_vd.shape[0]
    rows_BT = tokens_BT - jax.lax.axis_index(table_axes.rows) * v
    return (rows_BT >= 0) & (rows_BT < v), jnp.clip(rows_BT, 0, v - 1)
