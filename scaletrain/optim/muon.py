"""Muon: orthogonalised momentum, computed for a stack of matrices at a time.

The polar factor U V^T of X = U S V^T comes from odd polynomials of X, one after the
other, which are matmuls alone (Source: K. Jordan, "Muon", 2024; arXiv 2502.16982). Four
are enough here instead of five, since the coefficients of each are optimal for the
range of singular values that the one before returns (arXiv 2505.16932 section 3) and X
is first divided by its Schatten norm of order 8, which bounds the largest singular
value more closely than the Frobenius norm does and costs nothing beside A^2.
"""

import functools
import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from scaletrain import sharding

Tree = Any  # nested dicts mirroring the parameters
RMS = 0.2  # update size that lets Muon use AdamW's rates (arXiv 2502.16982, 2.2)
DECAY = 0.95  # of the momentum
SMALLEST = 0.004  # singular value over the norm from which on all end in BAND
BAND = (0.83, 1.17)
# (a, b, c) of a x + b x^3 + c x^5: minimax of |1 - p(x)|, first over [SMALLEST, 1],
# then over the range of the one before, 5% more at the upper end, beyond which rounding
# errors would grow without bounds.
POLYNOMIALS = (
    (8.3410, -24.5974, 18.2230),
    (3.8033, -2.5753, 0.4447),
    (3.2395, -2.2164, 0.4106),
    (2.3096, -1.5637, 0.3525),
)
_MARGIN = 1.02  # of the norm, for the same reason
_LEAST = 1e-30  # divisor, a squared norm: a matrix below it stays small
# From this many columns a row on it is less work to multiply polynomials of A = X X^T
# by each other, 4 m^2 n + 10 m^3 multiplications for two, than by X, 8 m^2 n + 4 m^3.
_WIDE = 1.5


class MuonState(NamedTuple):
    """The state of `scale_by_muon`."""

    taken: Int[Array, ""]  # updates
    mu: Tree  # momentum, in the precision of the parameters


def scale_by_muon(logical: Tree, dtype: str) -> optax.GradientTransformation:
    """Returns the transformation of gradients into directions of equal singular values.

    Args:
      logical: the logical axes of the parameters, each a matrix or a stack of them;
        "embed" is its inputs or its outputs and the other axes but "layers" together
        are the other side.
      dtype: format of the matmuls' inputs; they sum in float32.
    """

    def init(params: Tree) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), optax.tree.zeros_like(params))

    def update(grads: Tree, state: MuonState, params: Tree = None):
        del params
        taken = state.taken + 1
        wide = functools.partial(jnp.asarray, dtype=jnp.float32)
        mu = jax.tree.map(
            lambda m, g: DECAY * wide(m) + (1 - DECAY) * wide(g), state.mu, grads
        )
        # Nesterov's look ahead; what is common to both terms does not matter.
        ahead = DECAY / (1 - DECAY ** (taken + 1))
        now = (1 - DECAY) / (1 - DECAY**taken)
        seen = jax.tree.map(
            lambda m, g: (ahead * m + now * wide(g)).astype(dtype), mu, grads
        )
        updates = jax.tree.map(_direction, seen, logical)
        updates = jax.tree.map(lambda u, g: u.astype(g.dtype), updates, grads)
        mu = jax.tree.map(lambda m, old: m.astype(old.dtype), mu, state.mu)
        return updates, MuonState(taken, mu)

    return optax.GradientTransformation(init, cast(Any, update))


def _direction(x: Float[Array, "..."], axes: tuple[str, ...]) -> Float[Array, "..."]:
    """Returns the scaled polar factor of each matrix of a parameter."""
    stacked = axes[0] == "layers"
    if not stacked:
        x, axes = x[None], ("layers", *axes)
    side = axes.index("embed")
    embed_first = side == 1
    rows = x.shape[1] if embed_first else math.prod(x.shape[1:side])
    scale = RMS * math.sqrt(max(rows, math.prod(x.shape[1:]) // rows))

    def matrices(x):
        y_Lmn = orthogonalised(x.reshape(x.shape[0], rows, -1))
        return (scale * y_Lmn).astype(x.dtype).reshape(x.shape)

    y = _by_layers(matrices, x, axes)
    return y if stacked else y[0]


def orthogonalised(x_Lmn: Float[Array, "L m n"]) -> Float[Array, "L m n"]:
    """Returns the matrices with singular values in BAND, except those below SMALLEST.

    Those grow by a factor of 230 at most.
    """
    _, rows, columns = x_Lmn.shape
    small, large = sorted((rows, columns))
    # On the smaller side: A = X X^T and Q X, or A = X^T X and X Q.
    gram, apply = "lij,lkj->lik", "lik,lkj->lij"
    if rows > columns:
        gram, apply = "lji,ljk->lik", "lki,ljk->lji"
    at_once = 2 if large >= _WIDE * small else 1
    for i in range(0, len(POLYNOMIALS), at_once):
        a_Lmm = jnp.einsum(gram, x_Lmn, x_Lmn)
        if i == 0:
            a_Lmm, square_Lmm, norm_L11 = _normalised(a_Lmm)
        else:
            square_Lmm, norm_L11 = _times(a_Lmm, a_Lmm), 1.0
        q_Lmm = _product(POLYNOMIALS[i : i + at_once], a_Lmm, square_Lmm)
        q_Lmm = (q_Lmm.astype(jnp.float32) / norm_L11).astype(x_Lmn.dtype)
        x_Lmn = jnp.einsum(apply, q_Lmm, x_Lmn)
    return x_Lmn


def _normalised(a_Lmm: Array) -> tuple[Array, Array, Array]:
    """Returns A and A^2 of X over its norm, and the norm of X."""
    wide_Lmm = a_Lmm.astype(jnp.float32)
    # By the Frobenius norm first, the root of A's trace: A^2 of small gradients would
    # underflow to 0.
    trace_L11 = jnp.trace(wide_Lmm, axis1=1, axis2=2)[:, None, None]
    trace_L11 = jnp.maximum(trace_L11, _LEAST)
    a_Lmm = (wide_Lmm / trace_L11).astype(a_Lmm.dtype)
    square_Lmm = _times(a_Lmm, a_Lmm).astype(jnp.float32)
    sum_L11 = jnp.sum(jnp.square(square_Lmm), axis=(1, 2), keepdims=True)
    # The sum of A's eigenvalues to the fourth power: its fourth root is no less than
    # the largest eigenvalue.
    most_L11 = _MARGIN**2 * jnp.where(sum_L11 > 0, sum_L11, 1) ** 0.25
    a_Lmm = (a_Lmm.astype(jnp.float32) / most_L11).astype(a_Lmm.dtype)
    square_Lmm = (square_Lmm / jnp.square(most_L11)).astype(a_Lmm.dtype)
    return a_Lmm, square_Lmm, jnp.sqrt(trace_L11) * jnp.sqrt(most_L11)


def _product(
    polynomials: tuple[tuple[float, ...], ...], a_Lmm: Array, square_Lmm: Array
) -> Array:
    """Returns Q of one polynomial, or of two composed, the first one applied first.

    Three or four would let rounding errors of A grow to values of 30 in bfloat16.

    Args:
      polynomials: coefficients (a, b, c) of each.
      a_Lmm: A.
      square_Lmm: A^2.
    """
    q_Lmm = _polynomial(polynomials[0], a_Lmm, square_Lmm)
    for polynomial in polynomials[1:]:
        # All of these are polynomials of A, so that they commute.
        a_Lmm = _times(q_Lmm, _times(q_Lmm, a_Lmm))
        next_Lmm = _polynomial(polynomial, a_Lmm, _times(a_Lmm, a_Lmm))
        q_Lmm = _times(next_Lmm, q_Lmm)
    return q_Lmm


def _polynomial(
    coefficients: tuple[float, ...], a_Lmm: Array, square_Lmm: Array
) -> Array:
    """Returns a I + b A + c A^2 of coefficients (a, b, c), A and A^2."""
    a, b, c = coefficients
    sum_Lmm = b * a_Lmm.astype(jnp.float32) + c * square_Lmm.astype(jnp.float32)
    return (a * jnp.eye(a_Lmm.shape[1])[None] + sum_Lmm).astype(a_Lmm.dtype)


def _times(one_Lmm: Array, two_Lmm: Array) -> Array:
    """Returns the products of two stacks; hardware sums them in float32."""
    return jnp.einsum("lij,ljk->lik", one_Lmm, two_Lmm)


def _by_layers(
    function: Any, x: Float[Array, "..."], axes: tuple[str, ...]
) -> Float[Array, "..."]:
    """Returns `function` of a stack [L, ...], each device computing some of its layers.

    An all-to-all turns shards of every matrix into complete matrices of some layers,
    and a second one turns the results back. Otherwise every device would compute all
    layers.

    Args:
      function: of a stack [l, ...] of complete matrices, of the same shape.
      x: the stack.
      axes: the logical axis of each dim, "layers" first.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function(x)
    spec = sharding.spec(*axes)
    sharded = [
        (dim, name)
        for dim, entry in enumerate(spec)
        for name in ((entry,) if isinstance(entry, str) else entry or ())
        if mesh.shape[name] > 1
    ]
    assert all(dim for dim, _ in sharded), "the layer dim is not sharded"
    L, num_shards = x.shape[0], math.prod(mesh.shape[name] for _, name in sharded)
    replicas = []  # mesh axes along which devices have the same shards
    for name, size in mesh.shape.items():
        splits = name in [each for _, each in sharded]
        if size > 1 and not splits and num_shards < L:
            replicas.append(name)
            num_shards *= size

    def local(x):
        pad = [(0, -L % num_shards)] + [(0, 0)] * (x.ndim - 1)
        x = jnp.pad(x, pad)
        for dim, name in sharded:
            x = jax.lax.all_to_all(x, name, 0, dim, tiled=True)
        for name in replicas:
            count = x.shape[0] // mesh.shape[name]
            first = jax.lax.axis_index(name) * count
            x = jax.lax.dynamic_slice_in_dim(x, first, count)
        x = function(x)
        for name in reversed(replicas):
            x = jax.lax.all_gather(x, name, tiled=True)
        for dim, name in reversed(sharded):
            x = jax.lax.all_to_all(x, name, dim, 0, tiled=True)
        return x[:L]

    return sharding.by_device(local, spec, spec)(x)
