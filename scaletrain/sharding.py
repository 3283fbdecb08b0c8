"""Logical axes to mesh axes: the one place that decides what is split over what.

A parameter states its logical axes where it is created (`param`), an activation at
block boundaries (`constrain`); `Rules` has a field for each logical axis. An unknown
name, two dims on one mesh axis and a dim that does not divide all raise: nothing is
replicated unless a rule says so.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Float

from scaletrain.config import BATCH_AXES
from scaletrain.errors import ShardingError

MeshAxes = None | str | tuple[str, ...]
Tree = Any  # nested dicts of arrays, shapes or shardings


@dataclasses.dataclass(frozen=True)
class Rules:
    """The mesh axes that split each logical axis; None keeps it whole."""

    # activations
    batch: MeshAxes = BATCH_AXES
    tokens: MeshAxes = "context"
    residual: MeshAxes = None
    # parameters
    layers: MeshAxes = None
    embed: MeshAxes = "fsdp"
    norm: MeshAxes = None
    rank: MeshAxes = None
    positions: MeshAxes = None
    # both
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head: MeshAxes = None
    ff: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"


RULES = Rules()


def spec(*axes: str, rules: Rules = RULES) -> jax.P:
    """Returns the PartitionSpec of a tensor with these logical axes.

    Mesh axes that the surrounding `by_device` has cut the tensor over are left out.

    Raises:
      ShardingError: a name that `Rules` lacks, or one mesh axis for two dims.
    """
    names = [field.name for field in dataclasses.fields(rules)]
    for axis in axes:
        if axis not in names:
            raise ShardingError(
                f"logical axis {axis!r} of {axes}; no rule has that name; "
                f"use one of {', '.join(names)}."
            )
    entries = [_left(getattr(rules, axis)) for axis in axes]
    used = [m for e in entries if e for m in ((e,) if isinstance(e, str) else e)]
    for mesh_axis in used:
        if used.count(mesh_axis) > 1:
            raise ShardingError(
                f"logical axes {axes}; mesh axis {mesh_axis!r} would split two dims; "
                "name the axes so that each mesh axis is used once."
            )
    return jax.P(*entries)


def _left(entry: MeshAxes) -> MeshAxes:
    """Returns those of a dim's mesh axes that are still to be cut over."""
    done = jax.sharding.get_abstract_mesh().manual_axes
    if isinstance(entry, str):
        return None if entry in done else entry
    return tuple(axis for axis in entry if axis not in done) if entry else None


def by_device(
    here: Callable[..., Any], in_specs: Any, out_specs: Any, axes: Sequence[str] = ()
) -> Callable[..., Any]:
    """Returns `here` run on what each device holds, for what no compiler can cut.

    Without a mesh one device holds all.

    Args:
      axes: of the mesh, to cut over; all that are left by default.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return here
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        here,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes) or left,
        # What a kernel or a gathered stack varies over cannot be told to the check.
        check_vma=False,
    )


def on_local_rows(
    local: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[..., Any]:
    """Returns `local` run on the rows that each device holds.

    XLA cannot partition a kernel's call by itself.

    Args:
      inputs: dims of each argument. "BT..." is split over its rows; all else is
        replicated.
      outputs: dims of each result, in the same way; "P..." are partial sums, which lie
        one after another.
    """
    rows = spec("batch", "tokens")
    sums = mesh_axes("batch", "tokens")

    def spec_of(dims: str) -> jax.P:
        if dims.startswith("BT"):
            return jax.P(*rows, *(None,) * (len(dims) - 2))
        return jax.P(sums, *(None,) * (len(dims) - 1)) if dims[0] == "P" else jax.P()

    return by_device(local, tuple(map(spec_of, inputs)), tuple(map(spec_of, outputs)))


def mesh_axes(*axes: str) -> tuple[str, ...]:
    """Returns the mesh axes of several devices that split a tensor of these axes."""
    entries = ((e,) if isinstance(e, str) else e or () for e in spec(*axes))
    return tuple(axis for entry in entries for axis in entry if axis_size(axis) > 1)


def share(shape: tuple[int, ...], *axes: str) -> tuple[int, ...] | None:
    """Returns the shape of a tensor's part on each device; None if parts are uneven."""
    cuts = [math.prod(map(axis_size, mesh_axes(axis))) for axis in axes]
    pairs = list(zip(shape, cuts, strict=True))
    if any(size % cut for size, cut in pairs):
        return None
    return tuple(size // cut for size, cut in pairs)


def platform() -> str:
    """Returns the kind of the devices of the mesh in use; "" where it has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else ""


def device_kind() -> str:
    """Returns what jax calls the devices of the mesh in use; "" where it has none."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def axis_size(name: str) -> int:
    """Returns the size of an axis of the mesh in use, 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def named(
    mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> NamedSharding:
    """Returns the sharding of one tensor on `mesh`.

    Raises:
      ShardingError: `axes` does not fit `shape`, or a dim does not divide.
    """
    partition = spec(*axes)
    if len(axes) != len(shape):
        raise ShardingError(
            f"{path} {shape}; {len(axes)} logical axes {axes} for {len(shape)} dims; "
            "name one axis for each dim."
        )
    for dim, entry in zip(shape, partition, strict=True):
        parts = (entry,) if isinstance(entry, str) else entry or ()
        ways = math.prod(mesh.shape[name] for name in parts)
        if dim % ways:
            raise ShardingError(
                f"{path} {shape} on {axes}; {dim} does not divide over mesh axes "
                f"{' x '.join(parts)} = {ways}; change the mesh or the size."
            )
    return NamedSharding(mesh, partition)


def param(
    key: jax.Array,
    shape: tuple[int, ...],
    *axes: str,
    std: float,
    dtype: Any,
    kind: type[nnx.Param] = nnx.Param,
) -> nnx.Param:
    """Returns a parameter drawn from N(0, std^2) that knows its logical axes.

    A `std` of 0 gives zeros. Unknown axes raise here, where they are written.

    Args:
      kind: the type of the variable; it decides whether it is trained.
    """
    spec(*axes)
    zeros = jnp.zeros(shape, dtype)
    value = jax.random.normal(key, shape, dtype) * std if std else zeros
    return kind(value, logical=axes)


def constrain(
    x: Float[Array, "..."], *axes: str, cut_first: bool = False
) -> Float[Array, "..."]:
    """Returns `x` pinned to these logical axes on the current mesh.

    Args:
      cut_first: `x` is a sum over devices that is taken apart next. Inside `by_device`
        the compiler would cut its parts, and not see that the sum can be scattered.
    """
    partition, mesh = spec(*axes), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    x = jax.lax.with_sharding_constraint(x, partition)
    return jax.lax.optimization_barrier(x) if cut_first and mesh.manual_axes else x


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter with these logical axes is multiplied, not added."""
    return "embed" in axes or "rank" in axes


def logical_axes(variables: nnx.State) -> Tree:
    """Returns the logical axes of every variable, as nested dicts."""
    return of_variables(variables, lambda leaf: leaf.get_metadata("logical"))


def of_variables(variables: nnx.State, function: Callable[[nnx.Variable], Any]) -> Tree:
    """Returns `function` of every variable, as nested dicts."""
    flat = nnx.to_flat_state(variables)
    return _nested({tuple(map(str, path)): function(leaf) for path, leaf in flat})


def of_params(params: Tree, logical: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Returns the sharding of every parameter."""

    def layout(path: Any, leaf: Any, axes: tuple[str, ...]) -> NamedSharding:
        return named(mesh, "/".join(_names(path)), leaf.shape, axes)

    return jax.tree.map_with_path(layout, params, logical)


def _nested(flat: dict[tuple[str, ...], Any]) -> Tree:
    """Returns nested dicts of a flat dict with tuple keys."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def of_state(
    state: Any, params: Tree, shardings: Tree, mesh: Mesh | AbstractMesh
) -> Any:
    """Returns shardings for a state whose leaves mirror parameters.

    A leaf whose path ends in a parameter's path and has its shape is laid out like
    that parameter. All else is replicated on purpose: counters, and the factored
    statistics of Adafactor, which are vectors where the parameter is a matrix.
    """
    flat = jax.tree.flatten_with_path(params)[0]
    layout = dict(
        zip((_names(path) for path, _ in flat), jax.tree.leaves(shardings), strict=True)
    )
    shapes = {_names(path): leaf.shape for path, leaf in flat}

    def choose(path: Any, leaf: Any) -> NamedSharding:
        names = _names(path)
        for start in range(len(names)):
            if shapes.get(names[start:]) == leaf.shape:
                return layout[names[start:]]
        return NamedSharding(mesh, jax.P())

    return jax.tree.map_with_path(choose, state)


def _names(path: Any) -> tuple[str, ...]:
    return tuple(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))


def rows_here(batch: jax.ShapeDtypeStruct) -> list[int]:
    """Returns the rows of a sharded [B, ...] batch that this process's devices hold."""
    here = {
        row
        for index in _shards(batch).values()
        for row in range(*index[0].indices(batch.shape[0]))
    }
    return sorted(here)


def _shards(array: jax.ShapeDtypeStruct) -> dict[Any, tuple[slice, ...]]:
    """Returns what each device of this process holds of a sharded array."""
    indices = array.sharding.addressable_devices_indices_map(array.shape)
    return {device: index for device, index in indices.items() if index is not None}


def place(
    rows: dict[str, np.ndarray], batch: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns global arrays laid out like `batch` from the rows of `rows_here`."""
    here = np.array(rows_here(batch["tokens"]))

    def array(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        shards = []
        for device, (row_slice, columns) in _shards(shape).items():
            start, stop, _ = row_slice.indices(shape.shape[0])
            first, end = np.searchsorted(here, (start, stop))
            shards.append(jax.device_put(rows[name][first:end, columns], device))
        return jax.make_array_from_single_device_arrays(
            shape.shape, shape.sharding, shards
        )

    return {name: array(name, shape) for name, shape in batch.items()}


def nbytes(tree: Tree) -> int:
    """Returns the bytes of sharded shapes or arrays that one device holds."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def table(params: Tree) -> str:
    """Returns path, shape, dtype, spec and bytes a device of sharded `params`."""
    rows = [("parameter", "shape", "dtype", "spec", "bytes/device")]
    total = count = 0
    for path, leaf in jax.tree.flatten_with_path(params)[0]:
        size = nbytes(leaf)
        total, count = total + size, count + math.prod(leaf.shape)
        split = ", ".join(str(entry) for entry in leaf.sharding.spec)
        shape = "x".join(map(str, leaf.shape))
        rows.append(
            ("/".join(_names(path)), shape, str(leaf.dtype), f"({split})", f"{size:,}")
        )
    rows.append((f"{count:,} parameters", "", "", "", f"{total:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) for cell, width in zip(row[:4], widths, strict=False)
        ]
        lines.append("  ".join([*cells, row[4].rjust(widths[4])]).rstrip())
    return "\n".join(lines)
