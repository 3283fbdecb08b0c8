"""Matrices: what a decoder multiplies by, in the formats of the precision policy.

Matrices are stored in `precision.params`, multiplied in `precision.compute`, and their
gradients leave their matmuls, and are summed over devices, in `precision.gradients`.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from scaletrain import sharding
from scaletrain.config import LoraConfig, ModelConfig, PrecisionConfig
from scaletrain.matrices import Matrix
from scaletrain.models.quantised import Amax, project_fp8, project_int8
from scaletrain.sharding import constrain, param


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
    """
    return _project_forward(letters, x, w, precision)[0]


def _project_forward(letters, x, w, precision):
    low = w.astype(precision.compute)
    return jnp.einsum(letters, x, low), (x, w, gathered(low))


def gathered(low: Float[Array, "..."]) -> Float[Array, "..."] | None:
    """Returns what is kept of a matrix: all of one that devices share, as it was used.

    So they gather it once, unless the loop over layers or remat keeps their parts.
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
    """Returns those of `x` and of `w`, which is in the compute precision."""
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
    """Returns what `project` makes of `x` with `ws` beside each other."""
    return _project_all_forward(x_BTD, ws, precision)[0]


def _beside(ws: tuple[Array, ...], precision: PrecisionConfig) -> Array:
    return jnp.concatenate([w.astype(precision.compute) for w in ws], axis=1)


def _parts(whole: Array, ws: tuple[Array, ...]) -> tuple[Array, ...]:
    return tuple(jax.lax.split(whole, [w.shape[1] for w in ws], axis=whole.ndim - 1))


def _project_all_forward(x_BTD, ws, precision):
    low_DF = _beside(ws, precision)
    y_BTF = jnp.einsum("btd,df->btf", x_BTD, low_DF)
    return y_BTF, (x_BTD, ws, gathered(low_DF))


def _project_all_backward(precision, residuals, dy_BTF):
    x_BTD, ws, low_DF = residuals
    low_DF = _beside(ws, precision) if low_DF is None else low_DF
    dx_BTD, dw_DF = gradients("btd,df->btf", precision, x_BTD, low_DF, dy_BTF)
    dw_DF = constrain(dw_DF, "embed", "head", cut_first=True)
    dws = zip(_parts(dw_DF, ws), ws, strict=True)
    return dx_BTD, tuple(dw.astype(w.dtype) for dw, w in dws)


project_all.defvjp(_project_all_forward, _project_all_backward)


class Adapter(nnx.Param):
    """A matrix of a low-rank update: trained where the weights are frozen."""


class Linear(nnx.Module):
    """A matrix with its bias and, when it is adapted, a low-rank update beside it.

    The update is alpha / rank * x A B (arXiv 2106.09685 section 4.1). B starts at 0,
    so that an adapted model starts as the one it adapts.
    """

    def __init__(
        self,
        key: jax.Array,
        matrix: Matrix,
        model: ModelConfig,
        *,
        std: float,
        precision: PrecisionConfig,
        lora: LoraConfig,
        bias: bool = False,
    ):
        dtype, adapts = precision.params, matrix.name in lora.adapted
        low = matrix.name in precision.quantised
        axes, sizes = [dim.axis for dim in matrix.dims], matrix.sizes(model)
        inner = len(matrix.ins)  # dims that are summed over
        self.weight = param(key, sizes, *axes, std=std, dtype=dtype)
        # Vectors that are added to the residual stream stay whole, like norms.
        bias_axes = ("norm" if axis == "embed" else axis for axis in axes[inner:])
        self.bias = (
            param(key, sizes[inner:], *bias_axes, std=0.0, dtype=dtype)
            if bias
            else None
        )
        self.lora_a = (
            param(
                jax.random.fold_in(key, 1),
                (*sizes[:inner], lora.rank),
                *axes[:inner],
                "rank",
                std=math.prod(sizes[:inner]) ** -0.5,
                dtype=dtype,
                kind=Adapter,
            )
            if adapts
            else None
        )
        self.lora_b = (
            param(
                key,
                (lora.rank, *sizes[inner:]),
                "rank",
                *axes[inner:],
                std=0.0,
                dtype=dtype,
                kind=Adapter,
            )
            if adapts
            else None
        )
        self.matmul = precision.matmul if low else "compute"
        self.amax = (
            Amax(jnp.zeros(2), logical=("norm",))
            if low and precision.scaling == "delayed"
            else None
        )
        ins, outs = matrix.letters
        self.letters = f"bt{ins},{ins}{outs}->bt{outs}"
        self.letters_a = f"bt{ins},{ins}r->btr"
        self.letters_b = f"btr,r{outs}->bt{outs}"
        self.scale = lora.alpha / lora.rank if adapts else 0.0
        self.precision = precision

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Returns the product in the compute precision; a bias is added in `reduce`."""
        if self.matmul == "compute":
            y = project(self.letters, x, self.weight[...], self.precision)
        else:
            (y,) = _low(self.letters, x, [([self.weight[...]], [self])])
        return self.beside(x, y)

    @property
    def plain(self) -> bool:
        """Whether it is a product in the compute precision and nothing else."""
        return self.matmul == "compute" and self.bias is None and self.lora_a is None

    def beside(
        self, x: Float[Array, "..."], y: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the product `y` of `x` with what is added to it."""
        p = self.precision
        if self.lora_a is not None and self.lora_b is not None:
            low = project(self.letters_a, x, self.lora_a[...], p)
            y += self.scale * project(self.letters_b, low, self.lora_b[...], p)
        if self.bias is None:
            return y
        bias = self.bias[...]
        bias = bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return (y.astype(p.reduce) + bias.astype(p.reduce)).astype(y.dtype)


def together(
    x_BTD: Float[Array, "B T D"], linears: Sequence[Linear]
) -> list[Float[Array, "B T ..."]]:
    """Returns what each of `linears` makes of `x`, by one matmul of all.

    Where a mesh cuts their outputs the parts of one matrix lie on other devices than
    those of several, and each has a matmul of its own.
    """
    alone = sharding.axis_size("tensor") > 1
    D, kinds = x_BTD.shape[-1], {linear.matmul for linear in linears}
    if len(kinds) > 1 or (alone and kinds == {"compute"}):
        return [linear(x_BTD) for linear in linears]
    weights = [linear.weight[...] for linear in linears]
    ws = tuple(w.reshape(D, -1) for w in weights)
    if kinds == {"compute"}:
        ys = _parts(project_all(x_BTD, ws, linears[0].precision), ws)
    elif alone or all(w.shape[1] > D for w in ws):
        # Wide matrices fill the chip each on its own. Their gradients, side by side,
        # could not be quantised and transposed by the kernel that makes them.
        pairs = zip(ws, linears, strict=True)
        ys = _low("btd,df->btf", x_BTD, [([w], [linear]) for w, linear in pairs])
    else:
        (y_BTF,) = _low("btd,df->btf", x_BTD, [(ws, linears)])
        ys = _parts(y_BTF, ws)
    return [
        linear.beside(x_BTD, y.reshape(*y.shape[:2], *w.shape[1:]))
        for linear, y, w in zip(linears, ys, weights, strict=True)
    ]


def _low(
    letters: str,
    x: Float[Array, "..."],
    groups: Sequence[tuple[Sequence[Array], Sequence[Linear]]],
) -> tuple[Float[Array, "..."], ...]:
    """Returns the 8-bit product of `x` with the matrices of each group, and theirs."""
    ws = tuple(tuple(ws) for ws, _ in groups)
    first = groups[0][1][0]
    if first.matmul == "int8":
        return tuple(project_int8(letters, x, each, first.precision) for each in ws)
    expected = tuple(
        tuple(linear.amax[...] for linear in linears if linear.amax is not None)
        for _, linears in groups
    )
    return project_fp8(letters, x, ws, expected, first.precision)
