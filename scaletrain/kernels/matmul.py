"""A matmul on Hopper GPUs whose results are used while they are in registers.

The output is cut into tiles of 128 x 256. Of a block's three warpgroups two multiply
half of a tile's rows each, and one brings what they multiply. Blocks that share inputs,
and inputs that are given back a step later, did not make it faster on an H100; the
latter overwrites the last input of a tile with the first of the next.
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
    """The kernels' language, imported where one is made: it takes 0.3 s."""

    def __getattr__(self, name: str) -> Any:
        from jax.experimental.pallas import mosaic_gpu

        return getattr(mosaic_gpu, name)


plgpu = _Mosaic()
ROWS, COLUMNS = 64, 256  # of a tile, those of one warpgroup
PIECE = 64  # columns that are copied at once: 128 bytes, the widest swizzle
_DEPTH = 64  # of what is multiplied at once
# Of the inner dim; 2048 was timed. Multiplying alone takes 5% longer than the vendor's
# library, and an epilogue saves as much for any: by that, both are even at 6000.
_DEEPEST = 4096
_BESIDE = 16  # tiles in a row of the order they are taken in, so that inputs stay near

Refs = Sequence[Any]  # of the arrays beside the two that are multiplied


class Tile(NamedTuple):
    """A warpgroup's part of a tile."""

    group: Array  # which of the two it is
    row: Array  # its first in the output
    column: Array  # of tiles, not of values
    pieces: Any  # [2, slots, ROWS, PIECE] of shared memory; the first is the group's
    arrived: Any  # a barrier for each of them

    def write(self, value: Array, to: Any, column: Array, slot: int) -> None:
        """Starts writing ROWS x PIECE values to where the tile's rows are."""
        self.pieces[self.group, slot] = value
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            self.pieces.at[self.group, slot], self._place(to, column)
        )

    def fetch(self, source: Any, column: Array, slot: int) -> None:
        """Starts reading ROWS x PIECE values."""
        piece, arrived = self.pieces.at[self.group, slot], self._arrived(slot)
        plgpu.copy_gmem_to_smem(self._place(source, column), piece, arrived)

    def fetched(self, slot: int) -> Float[Array, "ROWS PIECE"]:
        """Returns what was read, in float32."""
        plgpu.barrier_wait(self._arrived(slot))
        return self.pieces[self.group, slot].astype(jnp.float32)

    def written(self, but: int = 0) -> None:
        """Waits until slots may be filled again, but those of the last writes."""
        plgpu.wait_smem_to_gmem(but, wait_read_only=True)

    def _place(self, ref: Any, column: Array) -> Any:
        return ref.at[pl.ds(self.row, ROWS), pl.ds(column, PIECE)]

    def _arrived(self, slot: int) -> Any:
        slots = self.pieces.shape[1]
        return self.arrived.at[self.group * slots + slot]


class Epilogue(NamedTuple):
    """What is done with a tile before and after it is multiplied."""

    prefetch: Callable[[Refs, Tile], None]
    finish: Callable[[Refs, Tile, Float[Array, "ROWS COLUMNS"]], None]
    slots: int  # pieces of shared memory for each warpgroup
    stages: int  # inputs on their way; with the pieces they fill the shared memory


def takes(rows: int, inner: int, columns: int, dtype: str) -> bool:
    """Whether the devices of the mesh in use run it, with these sizes on each."""
    whole = rows % (2 * ROWS) == inner % _DEPTH == columns % COLUMNS == 0
    fits = whole and inner <= _DEEPEST and dtype == "bfloat16"
    chip = by_kind(sharding.device_kind())
    return fits and chip is not None and chip.is_hopper


def matmul(
    epilogue: Epilogue,
    inputs: Sequence[Array],
    shapes: Sequence[tuple[int, int]],
    *,
    transposed: bool = False,
) -> list[Array]:
    """Returns what `epilogue` writes of x @ w, or of x @ w^T.

    Args:
      inputs: x [R, K], w [K, N], and what else `epilogue` reads.
      shapes: of the results.
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
    return (device and device.num_cores) or 1


def _body(epilogue: Epilogue, transposed: bool, x: Any, w: Any, *others: Any) -> None:
    R, K = x.shape
    N = w.shape[0] if transposed else w.shape[1]
    assert R % (2 * ROWS) == K % _DEPTH == N % COLUMNS == 0, "see `takes`"
    grid = R // (2 * ROWS), N // COLUMNS
    pipeline = functools.partial(_pipeline, K // _DEPTH, epilogue.stages, transposed)

    def block(allocations, pieces, arrived):
        group = jax.lax.axis_index("group")

        @plgpu.nd_loop((math.prod(grid),), collective_axes="block")
        def _(loop):
            down, across = plgpu.planar_snake(loop.index[0], grid, 0, _BESIDE)
            row = down * 2 * ROWS
            tile = Tile(group, row + group * ROWS, across, pieces, arrived)

            def multiply(_, x_here, w_here, sums):
                x_mine = x_here.at[pl.ds(group * ROWS, ROWS)]
                w_here = w_here.transpose((1, 0)) if transposed else w_here
                plgpu.wgmma(sums, x_mine, w_here)
                plgpu.wgmma_wait(0)
                return sums

            def around(run):
                def within(sums):
                    epilogue.prefetch(others, tile)
                    run(sums)
                    epilogue.finish(others, tile, sums[...])

                pl.run_scoped(within, plgpu.ACC((ROWS, COLUMNS), jnp.float32))

            columns = pl.ds(across * COLUMNS, COLUMNS)
            pipeline(multiply, around)(
                x.at[pl.ds(row, 2 * ROWS), :],
                w.at[columns, :] if transposed else w.at[:, columns],
                allocations=allocations,
            )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    shape = 2, epilogue.slots, ROWS, PIECE
    pl.run_scoped(
        block,
        pipeline(_nothing, _nothing).get_allocations(x, w),
        plgpu.SMEM(shape, x.dtype, transforms=_swizzled()),
        plgpu.Barrier(num_barriers=2 * epilogue.slots),
        collective_axes="group",
    )


def _pipeline(steps: int, stages: int, transposed: bool, step: Any, around: Any) -> Any:
    """Returns the loop over the inner dim of a tile."""
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
        memory_registers=40,
        wg_axis="group",
        num_compute_wgs=2,
        max_concurrent_steps=stages,
        compute_context=around,
    )


def _nothing(*_: Any) -> None:
    """Stands for what a pipeline does, which its buffers do not depend on."""


def _swizzled() -> tuple[Any, ...]:
    """Returns the layout of 64 columns of 16 bits in shared memory."""
    return plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)
