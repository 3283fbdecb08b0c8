"""The gated feed-forward branch on Hopper GPUs, with the activation inside the matmuls.

XLA writes gate and up in one matmul and reads both again to multiply them; in the
backward pass it writes the gradient of their product and reads it again. In this module
the epilogue of the first matmul multiplies gate and up in registers, and the epilogue
of the matmul for the gradient of the product computes those of gate and up. That takes
5% (forward) and 11% (backward) less time for 32,768 tokens and matrices of 2048 x 8192
on an H100.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from scaletrain import sharding
from scaletrain.kernels.matmul import (
    COLUMNS,
    PIECE,
    Epilogue,
    Refs,
    Tile,
    matmul,
    takes,
)

# Columns of gate, then as many of up: a tile then has both factors of its products.
STRIPE = COLUMNS // 2
# x -> u, du/dx of an activation x * sigmoid(u).
Gate = Callable[[Array], tuple[Array, Array]]


def silu(x: Array) -> tuple[Array, Array]:
    """Returns u and du/dx of SiLU (arXiv 1702.03118), where u = x."""
    return x, jnp.ones_like(x)


def gelu(x: Array) -> tuple[Array, Array]:
    """Returns u and du/dx of GELU's tanh approximation (arXiv 1606.08415 section 2).

    (1 + tanh(v)) / 2 = sigmoid(2 v), so that u = 2 sqrt(2 / pi) (x + 0.044715 x^3).
    """
    rate, square = 2 * math.sqrt(2 / math.pi), x * x
    return rate * x * (1 + 0.044715 * square), rate * (1 + 3 * 0.044715 * square)


def interleaved(gate_DF: Float[Array, "D F"], up_DF: Float[Array, "D F"]) -> Array:
    """Returns [D, 2 F]: STRIPE columns of gate, as many of up, and so on."""
    D, F = gate_DF.shape
    both = [each.reshape(D, F // STRIPE, 1, STRIPE) for each in (gate_DF, up_DF)]
    return jnp.concatenate(both, axis=2).reshape(D, 2 * F)


def deinterleaved(both_DG: Float[Array, "D G"]) -> tuple[Array, Array]:
    """Returns gate and up, each [D, F], of their interleaved columns; G = 2 F."""
    D, G = both_DG.shape
    stripes = both_DG.reshape(D, G // (2 * STRIPE), 2, STRIPE)
    return stripes[:, :, 0].reshape(D, G // 2), stripes[:, :, 1].reshape(D, G // 2)


def supports(shape_BTD: tuple[int, ...], d_ff: int, compute: str) -> bool:
    """Whether the mesh's devices run `forward` and `backward` with these sizes.

    Args:
      shape_BTD: of the branch's input, on the whole mesh.
      d_ff: F, the columns of gate and of up.
      compute: format of the matmuls, as `precision.compute`.
    """
    local_BT = sharding.shard_shape(shape_BTD[:2], "batch", "tokens")
    if local_BT is None or sharding.axis_size("tensor") > 1:
        return False
    return takes(math.prod(local_BT), shape_BTD[2], d_ff, compute)


def forward(
    gate: Gate,
    x_BTD: Float[Array, "B T D"],
    w_DG: Float[Array, "D G"],
) -> tuple[Array, Array, Array]:
    """Returns gate, up and their product, activation(gate) * up, each [B, T, F].

    Args:
      gate: the activation.
      x_BTD: input of the branch.
      w_DG: matrices of gate and up, see `interleaved`; G = 2 F.
    """

    def local(x_BTD, w_DG):
        (B, T, D), F = x_BTD.shape, w_DG.shape[1] // 2
        epilogue = Epilogue(
            _no_prefetch, functools.partial(_write_product, gate), slots=2, stages=4
        )
        inputs, shapes = (x_BTD.reshape(B * T, D), w_DG), [(B * T, F)] * 3
        outs = matmul(epilogue, inputs, shapes)
        return tuple(each.reshape(B, T, F) for each in outs)

    run = sharding.on_local_rows(local, ("BTD", "DG"), ("BTF",) * 3)
    return run(x_BTD, w_DG)


def backward(
    gate: Gate,
    streams: tuple[Array, Array, Array],
    down_FD: Float[Array, "F D"],
    with_product: bool,
) -> tuple[Array, ...]:
    """Returns the gradients of gate and up, [B, T, 2 F] as `interleaved`.

    Args:
      gate: the activation.
      streams: the gradient of product @ down [B, T, D]; gate and up, each [B, T, F].
      down_FD: the matrix of the projection to the stream.
      with_product: returns the product [B, T, F] too, recomputed from gate and up; it
        equals that of `forward` bit by bit.
    """

    def local(dout_BTD, gate_BTF, up_BTF, down_FD):
        (B, T), F = dout_BTD.shape[:2], down_FD.shape[0]
        finish = functools.partial(_write_gradients, gate)
        epilogue = Epilogue(_prefetch, finish, slots=4 + with_product, stages=3)
        dout_RD, *both = (x.reshape(B * T, -1) for x in (dout_BTD, gate_BTF, up_BTF))
        outs = matmul(
            epilogue,
            (dout_RD, down_FD, *both),
            [(B * T, 2 * F), (B * T, F)][: 1 + with_product],
            transposed=True,
        )
        return tuple(each.reshape(B, T, -1) for each in outs)

    outs = ("BTG", "BTF")[: 1 + with_product]
    run = sharding.on_local_rows(local, ("BTD", "BTF", "BTF", "FD"), outs)
    return run(*streams, down_FD)


def _sigmoid(x: Array) -> Array:
    """Returns 1 / (1 + exp(-x)); a GPU computes a root faster than a quotient."""
    return jnp.square(jax.lax.rsqrt(1 + jnp.exp(-x)))


def _no_prefetch(refs: Refs, tile: Tile) -> None:
    """Fetches no array: the forward epilogue reads only the tile itself."""


def _write_product(gate: Gate, refs: Refs, tile: Tile, sums: Array) -> None:
    """Writes gate, up and their product.

    The product is that of the rounded values, so that `backward` can recompute it.
    """
    gate_RF, up_RF, product_RF = refs
    both = sums.astype(gate_RF.dtype)
    for i in range(0, STRIPE, PIECE):
        low_gate, low_up = (both[:, j : j + PIECE] for j in (i, STRIPE + i))
        wide = low_gate.astype(jnp.float32)
        product = wide * _sigmoid(gate(wide)[0]) * low_up.astype(jnp.float32)
        values = low_gate, low_up, product.astype(both.dtype)
        for n, (value, ref) in enumerate(
            zip(values, (gate_RF, up_RF, product_RF), strict=True)
        ):
            # Two slots in turn: only the last write may still read its slot.
            tile.wait_for_writes(pending=1)
            slot = (i // PIECE * 3 + n) % 2
            tile.write(value, ref, tile.column * STRIPE + i, slot)


def _prefetch(refs: Refs, tile: Tile) -> None:
    """Fetches the first two pieces of gate and up, while the tile is multiplied."""
    tile.wait_for_writes()
    for i in (0, PIECE):
        _fetch_piece(refs, tile, i)


def _fetch_piece(refs: Refs, tile: Tile, i: int) -> None:
    """Starts reading a piece of gate and of up, from column `i` of the tile."""
    for n, ref in enumerate(refs[:2]):
        tile.fetch(ref, tile.column * COLUMNS + i, 2 * (i // PIECE % 2) + n)


def _write_gradients(gate: Gate, refs: Refs, tile: Tile, sums: Array) -> None:
    """Writes the gradients of gate and up, from the gradient of the product in `sums`.

    With x = gate and s = sigmoid(u), the product is x s up; its derivative by x is
    up (s + x s (1 - s) du/dx).
    """
    both_RG, *product_RF = refs[2:]
    for i in range(0, COLUMNS, PIECE):
        slot = 2 * (i // PIECE % 2)
        x, up = tile.fetched(slot), tile.fetched(slot + 1)
        d, (u, du) = sums[:, i : i + PIECE], gate(x)
        sigmoid = _sigmoid(u)
        value = x * sigmoid
        dx = d * up * (sigmoid + value * (1 - sigmoid) * du)
        column = tile.column * 2 * COLUMNS + i // STRIPE * 2 * STRIPE + i % STRIPE
        tile.write(dx.astype(both_RG.dtype), both_RG, column, slot)
        dup = (d * value).astype(both_RG.dtype)
        tile.write(dup, both_RG, column + STRIPE, slot + 1)
        for ref in product_RF:
            product = (value * up).astype(ref.dtype)
            tile.write(product, ref, tile.column * COLUMNS + i, 4)
        if i + PIECE < COLUMNS:
            tile.wait_for_writes()
        if i + 2 * PIECE < COLUMNS:
            _fetch_piece(refs, tile, i + 2 * PIECE)
