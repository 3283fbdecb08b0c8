"""Logical axes to mesh axes: the one place that decides how tensors are sharded.

A parameter states its logical axes where it is created (`param`), an activation at
block boundaries (`constrain`); `Rules` has a field for each logical axis. An unknown
name, two dims on one mesh axis and a dim that does not divide all raise: nothing is
replicated unless a rule says so.

The behaviour of a layer depends on the ambient mesh, the one of `jax.set_mesh`. These
functions of this module read it: `spec`, `by_device`, `on_local_rows`, `mesh_axes`,
`shard_shape`, `platform`, `device_kind`, `axis_size` and `constrain`. Through them it
decides in each kernel's `supports`, in attention, `look_up`, `head_loss` and the
products of `models`; `optim.muon` and `kernels.matmul` read it themselves. Without a
mesh one device has all of every tensor, and nothing is constrained.
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
    """The mesh axes that shard each logical axis; None replicates it."""

    # activations
    batch: MeshAxes = BATCH_AXES
    tokens: MeshAxes = "context"
    residual: MeshAxes = None
    # any dim that is replicated for another reason than its kind, such as a bias of
    # the residual stream or a matrix that its users have gathered
    replicated: MeshAxes = None
    # parameters
    layers: MeshAxes = None
    embed: MeshAxes = "fsdp"
    norm: MeshAxes = None
    rank: MeshAxes = None
    positions: MeshAxes = None
    # both
    heads: MeshAxes = "tensor"
    kv_heads: MeshAxes = "tensor"
    head_dim: MeshAxes = None
    ff: MeshAxes = "tensor"
    vocab: MeshAxes = "tensor"


RULES = Rules()


def spec(*axes: str, rules: Rules = RULES) -> jax.P:
    """Returns the PartitionSpec of a tensor with these logical axes.

    Mesh axes that the surrounding `by_device` has already split are left out.

    Raises:
      ShardingError: a name that `Rules` lacks, or one mesh axis for two dims.

    Example:
      >>> tuple(spec("batch", "tokens", "residual"))
      (('data', 'fsdp'), 'context', None)
    """
    names = [field.name for field in dataclasses.fields(rules)]
    for axis in axes:
        if axis not in names:
            raise ShardingError(
                f"logical axis {axis!r} of {axes}; no rule has that name; "
                f"use one of {', '.join(names)}."
            )
    entries = [_automatic(getattr(rules, axis)) for axis in axes]
    used = [m for e in entries if e for m in ((e,) if isinstance(e, str) else e)]
    for mesh_axis in used:
        if used.count(mesh_axis) > 1:
            raise ShardingError(
                f"logical axes {axes}; mesh axis {mesh_axis!r} would split two dims; "
                "name the axes so that each mesh axis is used once."
            )
    return jax.P(*entries)


def _automatic(entry: MeshAxes) -> MeshAxes:
    """Returns those mesh axes of a dim that no surrounding `by_device` has split."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if isinstance(entry, str):
        return None if entry in manual else entry
    return tuple(axis for axis in entry if axis not in manual) if entry else None


def by_device(
    local: Callable[..., Any], in_specs: Any, out_specs: Any, axes: Sequence[str] = ()
) -> Callable[..., Any]:
    """Returns `local` run on the shards of each device, as XLA cannot partition it.

    Without a mesh it is `local` itself: one device has all.

    Args:
      local: a function of one device's shards, which may call collectives.
      in_specs: the PartitionSpec of each argument.
      out_specs: the PartitionSpec of each result.
      axes: mesh axes to split over; () = all that no surrounding `by_device` splits.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local
    automatic = set(mesh.axis_names) - set(mesh.manual_axes)
    return jax.shard_map(
        local,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(axes) or automatic,
        # Neither a kernel's outputs nor a gathered stack can state which mesh axes they
        # vary over, as the check would need.
        check_vma=False,
    )


def on_local_rows(
    local: Callable[..., Any], inputs: Sequence[str], outputs: Sequence[str]
) -> Callable[..., Any]:
    """Returns `local` run on the rows of each device.

    XLA cannot partition a kernel's call by itself.

    Args:
      local: a function of one device's rows.
      inputs: dims of each argument. "BT..." is split over its rows; other
        arguments are replicated.
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
    """Returns the mesh axes of size 2 or more that split a tensor of these axes."""
    entries = ((e,) if isinstance(e, str) else e or () for e in spec(*axes))
    return tuple(axis for entry in entries for axis in entry if axis_size(axis) > 1)


def shard_shape(shape: tuple[int, ...], *axes: str) -> tuple[int, ...] | None:
    """Returns the shape of a tensor's shards; None if they would be uneven."""
    counts = [math.prod(map(axis_size, mesh_axes(axis))) for axis in axes]
    pairs = list(zip(shape, counts, strict=True))
    if any(size % num_shards for size, num_shards in pairs):
        return None
    return tuple(size // num_shards for size, num_shards in pairs)


def platform() -> str:
    """Returns the platform (cpu, gpu, tpu) of the ambient mesh; "" without devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else ""


def device_kind() -> str:
    """Returns jax's device_kind of the ambient mesh; "" without devices."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.device_kind if device else ""


def axis_size(name: str) -> int:
    """Returns the size of an axis of the ambient mesh; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(name, 1)


def named(
    mesh: Mesh | AbstractMesh, path: str, shape: tuple[int, ...], axes: tuple[str, ...]
) -> NamedSharding:
    """Returns the sharding of one tensor on `mesh`.

    Args:
      mesh: with or without devices.
      path: the tensor's name, for messages.
      shape: of the complete tensor.
      axes: the logical axis of each dim.

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
        names = (entry,) if isinstance(entry, str) else entry or ()
        num_shards = math.prod(mesh.shape[name] for name in names)
        if dim % num_shards:
            raise ShardingError(
                f"{path} {shape} on {axes}; {dim} does not divide over mesh axes "
                f"{' x '.join(names)} = {num_shards}; change the mesh or the size."
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
      key: a random key; unused where `std` is 0.
      shape: of the complete parameter.
      *axes: the logical axis of each dim.
      std: standard deviation.
      dtype: the format it is stored in.
      kind: the type of the variable; it decides whether it is trained.
    """
    spec(*axes)
    zeros = jnp.zeros(shape, dtype)
    value = jax.random.normal(key, shape, dtype) * std if std else zeros
    return kind(value, logical=axes)


def constrain(
    x: Float[Array, "..."], *axes: str, reduce_first: bool = False
) -> Float[Array, "..."]:
    """Returns `x` pinned to these logical axes on the ambient mesh.

    Args:
      x: a tensor.
      *axes: the logical axis of each dim.
      reduce_first: set where `x` is a partial sum that the next operation splits.
        Inside `by_device`, a barrier keeps XLA from splitting before it reduces, so
        that it emits a reduce-scatter instead of an all-reduce.
    """
    partition, mesh = spec(*axes), jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    x = jax.lax.with_sharding_constraint(x, partition)
    return jax.lax.optimization_barrier(x) if reduce_first and mesh.manual_axes else x


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter with these logical axes is an operand of a matmul."""
    return "embed" in axes or "rank" in axes


def logical_axes(variables: nnx.State) -> Tree:
    """Returns the logical axes of every variable, as nested dicts."""
    return of_variables(variables, lambda leaf: leaf.get_metadata("logical"))


def of_variables(variables: nnx.State, function: Callable[[nnx.Variable], Any]) -> Tree:
    """Returns `function` of every variable, as nested dicts."""
    flat = nnx.to_flat_state(variables)
    return _nested({tuple(map(str, path)): function(leaf) for path, leaf in flat})


def of_params(params: Tree, logical: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Returns the sharding of every parameter.

    Args:
      params: nested dicts of arrays or shapes.
      logical: the logical axes of each, in the same nested dicts.
      mesh: with or without devices.
    """

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
    that parameter. Other leaves are replicated on purpose: counters, and the factored
    statistics of Adafactor, which are vectors where the parameter is a matrix.

    Args:
      state: such as an optimizer's, of arrays or shapes.
      params: the parameters.
      shardings: the sharding of each parameter.
      mesh: with or without devices.
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


def local_rows(batch: jax.ShapeDtypeStruct) -> list[int]:
    """Returns the rows of a sharded [B, ...] batch on the devices of this process."""
    rows = {
        row
        for index in _shards(batch).values()
        for row in range(*index[0].indices(batch.shape[0]))
    }
    return sorted(rows)


def _shards(array: jax.ShapeDtypeStruct) -> dict[Any, tuple[slice, ...]]:
    """Returns the slices of a sharded array by device of this process."""
    indices = array.sharding.addressable_devices_indices_map(array.shape)
    return {device: index for device, index in indices.items() if index is not None}


def place(
    rows: dict[str, np.ndarray], batch: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
    """Returns global arrays laid out like `batch` from the rows of `local_rows`."""
    row_numbers = np.array(local_rows(batch["tokens"]))

    def array(name: str, shape: jax.ShapeDtypeStruct) -> jax.Array:
        shards = []
        for device, (row_slice, columns) in _shards(shape).items():
            start, stop, _ = row_slice.indices(shape.shape[0])
            first, end = np.searchsorted(row_numbers, (start, stop))
            shards.append(jax.device_put(rows[name][first:end, columns], device))
        return jax.make_array_from_single_device_arrays(
            shape.shape, shape.sharding, shards
        )

    return {name: array(name, shape) for name, shape in batch.items()}


def nbytes(tree: Tree) -> int:
    """Returns the bytes that sharded shapes or arrays take on one device."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def table(params: Tree) -> str:
    """Returns a table of sharded `params`: path, shape, dtype, spec, bytes a device."""
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
        cells = [row[i].ljust(widths[i]) for i in range(4)]
        lines.append("  ".join([*cells, row[4].rjust(widths[4])]).rstrip())
    return "\n".join(lines)
