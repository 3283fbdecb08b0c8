"""A matmul on Hopper GPUs with an epilogue that uses results while in registers.

The output is split into tiles of 128 x 256. A block has three warpgroups: two multiply,
each half of a tile's rows, and one copies their inputs to shared memory. Two variants
were not faster on an H100: blocks that share inputs, and inputs whose memory is
released one step later. The latter also overwrites the last input of a tile with the
first of the next.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from scaletrain import sharding
from scaletrain.hardware.chips import by_kind


class _Mosaic:
    """The kernels' language, imported at the first use: the import takes 0.3 s."""

    def __getattr__(self, name: str) -> Any:
        from jax.experimental.pallas import mosaic_gpu

        return getattr(mosaic_gpu, name)


plgpu = _Mosaic()
ROWS, COLUMNS = 64, 256  # of a warpgroup's part of a tile
PIECE = 64  # columns that are copied at once: 128 bytes, the widest swizzle
_DEPTH = 64  # slice of the inner dim that is multiplied at once
# The largest inner dim; 2048 was timed. The matmul alone takes 5% longer than that of
# the vendor's library, and an epilogue saves the same time for any inner dim: by that,
# both are equal at 6000.
_MAX_INNER = 4096
_SNAKE_WIDTH = 16  # tiles in a row of their order, so that inputs stay in the cache

Refs = Sequence[Any]  # the arrays that an epilogue reads and those that it writes


class Tile(NamedTuple):
    """A warpgroup's part of a tile, with the shared memory of its epilogue."""

    group: Array  # index of the warpgroup, 0 or 1
    row: Array  # of the output, the first of this part
    column: Array  # of the tile among tiles, not among values
    pieces: Any  # [2, slots, ROWS, PIECE] of shared memory; the first dim is the group
    arrived: Any  # one barrier for each group and slot

    def write(self, value: Array, to: Any, column: Array, slot: int) -> None:
        """Starts writing ROWS x PIECE values to the rows of this part.

        Args:
          value: [ROWS, PIECE], in the format of `to`.
          to: array in global memory.
          column: the first of `to` that is written.
          slot: of shared memory, on the way to `to`; see `wait_for_writes`.
        """
        self.pieces[self.group, slot] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            self.pieces.at[self.group, slot], self._place(to, column)
        )

    def fetch(self, source: Any, column: Array, slot: int) -> None:
        """Starts reading ROWS x PIECE values of the rows of this part.

        Args:
          source: array in global memory.
          column: the first of `source` that is read.
          slot: of shared memory, where `fetched` gets the values.
        """
        piece, arrived = self.pieces.at[self.group, slot], self._arrived(slot)
        plgpu.copy_gmem_to_smem(self._place(source, column), piece, arrived)

    def fetched(self, slot: int) -> Float[Array, "ROWS PIECE"]:
        """Returns the values that `fetch` reads, in float32; waits for them."""
        plgpu.barrier_wait(self._arrived(slot))
        return self.pieces[self.group, slot].astype(jnp.float32)

    def wait_for_writes(self, pending: int = 0) -> None:
        """Waits until slots can be reused, but those of the last `pending` writes."""
        plgpu.wait_smem_to_gmem(pending, wait_read_only=True)

    def _place(self, ref: Any, column: Array) -> Any:
        return ref.at[pl.ds(self.row, ROWS), pl.ds(column, PIECE)]

    def _arrived(self, slot: int) -> Any:
        slots = self.pieces.shape[1]
        return self.arrived.at[self.group * slots + slot]


class Epilogue(NamedTuple):
    """The work on a tile before and after its matmul, and the memory of both."""

    prefetch: Callable[[Refs, Tile], None]  # before
    finish: Callable[
        [Refs, Tile, Float[Array, "ROWS COLUMNS"]], None
    ]  # with the result
    slots: int  # pieces of shared memory for each warpgroup
    stages: int  # inputs in flight; with the pieces they fill the shared memory


def takes(rows: int, inner: int, columns: int, dtype: str) -> bool:
    """Whether the devices of the mesh in use can run `matmul` with these sizes.

    Args:
      rows: of x on one device.
      inner: the dim that is summed over.
      columns: of w.
      dtype: of x and w.
    """
    is_even = rows % (2 * ROWS) == inner % _DEPTH == columns % COLUMNS == 0
    fits = is_even and inner <= _MAX_INNER and dtype == "bfloat16"
    chip = by_kind(sharding.device_kind())
    return fits and chip is not None and chip.is_hopper


def matmul(
    epilogue: Epilogue,
    inputs: Sequence[Array],
    shapes: Sequence[tuple[int, int]],
    *,
    transposed: bool = False,
) -> list[Array]:
    """Returns the arrays that `epilogue` writes, from the tiles of x @ w or x @ w^T.

    Args:
      epilogue: computes the results, tile by tile.
      inputs: x [R, K], w [K, N], and the other arrays that `epilogue` reads.
      shapes: of the results; their format is that of x.
      transposed: w is [N, K].
    """
    return plgpu.kernel(
        functools.partial(_body, epilogue, transposed),
        out_type=[jax.ShapeDtypeStruct(each, inputs[0].dtype) for each in shapes],
        grid=(_multiprocessors(),),
        grid_names=("block",),
        num_threads=3,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup
        ),
        kernel_name="matmul",
    )(*inputs)


def _multiprocessors() -> int:
    device = jax.sharding.get_abstract_mesh().abstract_device
    # Not known without a GPU: the interpreter runs one block.
    return (device and device.num_cores) or 1


def _body(epilogue: Epilogue, transposed: bool, x: Any, w: Any, *others: Any) -> None:
    R, K = x.shape
    N = w.shape[0] if transposed else w.shape[1]
    assert R % (2 * ROWS) == K % _DEPTH == N % COLUMNS == 0, "see `takes`"
    tiles = R // (2 * ROWS), N // COLUMNS
    pipeline = functools.partial(_pipeline, K // _DEPTH, epilogue.stages, transposed)

    def block(allocations, pieces, arrived):
        group = jax.lax.axis_index("group")

        @plgpu.nd_loop((math.prod(tiles),), collective_axes="block")
        def _(loop):
            down, across = plgpu.planar_snake(loop.index[0], tiles, 0, _SNAKE_WIDTH)
            row = down * 2 * ROWS
            tile = Tile(group, row + group * ROWS, across, pieces, arrived)

            def multiply(_, x_block, w_block, sums):
                x_group = x_block.at[pl.ds(group * ROWS, ROWS)]
                w_block = w_block.transpose((1, 0)) if transposed else w_block
                plgpu.wgmma(sums, x_group, w_block)
                plgpu.wgmma_wait(0)
                return sums

            def with_epilogue(run_pipeline):
                def tile_body(sums):
                    epilogue.prefetch(others, tile)
                    run_pipeline(sums)
                    epilogue.finish(others, tile, sums[...])

                pl.run_scoped(tile_body, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

            columns = pl.ds(across * COLUMNS, COLUMNS)
            pipeline(multiply, with_epilogue)(
                x.at[pl.ds(row, 2 * ROWS), :],
                w.at[columns, :] if transposed else w.at[:, columns],
                allocations=allocations,
            )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = 2, epilogue.slots, ROWS, PIECE
    pl.run_scoped(
        block,
        pipeline(_no_op, _no_op).get_allocations(x, w),
        plgpu.SMEM(shape, x.dtype, transforms=_swizzled()),
        plgpu.Barrier(num_barriers=2 * epilogue.slots),
        collective_axes="group",
    )


def _pipeline(
    steps: int, stages: int, transposed: bool, step: Any, compute_context: Any
) -> Any:
    """Returns the loop over the inner dim of a tile, with inputs copied ahead.

    Args:
      steps: slices of the inner dim.
      stages: slices in flight.
      transposed: see `matmul`.
      step: multiplies one slice.
      compute_context: runs the loop on a multiplying warpgroup, with its accumulator.
    """
    spec = functools.partial(
        plgpu.BlockSpec,
        transforms=_swizzled(),
        memory_space=plgpu.SMEM,
    )
    if transposed:
        w_spec = spec((COLUMNS, _DEPTH), lambda k: (0, k))
    else:
        w_spec = spec((_DEPTH, COLUMNS), lambda k: (k, 0))
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=(steps,),
        in_specs=[spec((2 * ROWS, _DEPTH), lambda k: (0, k)), w_spec],
        memory_registers=40,  # for the copying warpgroup; the rest is for the products
        wg_axis="group",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=compute_context,
    )


def _no_op(*_: Any) -> None:
    """Placeholder for the work of a pipeline; its buffers do not depend on the work."""


def _swizzled() -> tuple[Any, ...]:
    """Returns the layout of 64 columns of 16 bits in shared memory."""
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
