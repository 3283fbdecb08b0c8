"""The linear layer of a decoder: a matrix with its bias and its adapter.

Which product a `Linear` uses:
  precision.matmul          one layer        several layers with one input
  compute                   `project`        `project_all`; one each if tensor > 1
  fp8, int8 (its targets)   `project_fp8`, `project_int8`; see `fused_projections`
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from scaletrain import sharding
from scaletrain.config import LoraConfig, ModelConfig, PrecisionConfig
from scaletrain.matrices import Matrix
from scaletrain.models.product import project, project_all, split_columns
from scaletrain.models.quantised import Amax, project_fp8, project_int8
from scaletrain.sharding import param


class Adapter(nnx.Param):
    """A matrix of a low-rank update: trained where the weights are frozen."""


def _adapter(
    key: jax.Array, matrix: Matrix, model: ModelConfig, rank: int, dtype: str
) -> tuple[nnx.Param, nnx.Param]:
    """Returns A [inputs, rank] and B [rank, outputs] of a low-rank update.

    Args:
      key: the key of the matrix that is adapted; A is drawn from one folded from it.
      matrix: the matrix that is adapted.
      model: it has the sizes of the matrix.
      rank: columns of A and rows of B.
      dtype: the format of both.
    """
    axes, sizes = [dim.axis for dim in matrix.dims], matrix.sizes(model)
    inner = len(matrix.ins)
    lora_a = param(
        jax.random.fold_in(key, 1),
        (*sizes[:inner], rank),
        *axes[:inner],
        "rank",
        std=math.prod(sizes[:inner]) ** -0.5,
        dtype=dtype,
        kind=Adapter,
    )
    lora_b = param(
        key,
        (rank, *sizes[inner:]),
        "rank",
        *axes[inner:],
        std=0.0,
        dtype=dtype,
        kind=Adapter,
    )
    return lora_a, lora_b


class Linear(nnx.Module):
    """A matrix with its bias and, where it is adapted, a low-rank update.

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
        # Vectors that are added to the residual stream are replicated, like norms.
        bias_axes = ("replicated" if a == "embed" else a for a in axes[inner:])
        self.bias = (
            param(key, sizes[inner:], *bias_axes, std=0.0, dtype=dtype)
            if bias
            else None
        )
        # One assignment each: the first one decides whether nnx treats it as data.
        self.lora_a, self.lora_b = (
            _adapter(key, matrix, model, lora.rank, dtype) if adapts else (None, None)
        )
        self.matmul = precision.matmul if low else "compute"
        self.amax = (
            Amax(jnp.zeros(2), logical=("replicated",))
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
        """Returns the layer's output in the compute precision."""
        if self.matmul == "compute":
            y = project(self.letters, x, self.weight[...], self.precision)
        else:
            (y,) = _project_low(self.letters, x, [([self.weight[...]], [self])])
        return self.add_adapter_and_bias(x, y)

    @property
    def plain(self) -> bool:
        """Whether the layer is a product in the compute precision and nothing more."""
        return self.matmul == "compute" and self.bias is None and self.lora_a is None

    def add_adapter_and_bias(
        self, x: Float[Array, "..."], y: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Returns the product `y` of `x`, with adapter output and bias if it has them.

        The bias is added in `precision.reduce`.
        """
        p = self.precision
        if self.lora_a is not None and self.lora_b is not None:
            low = project(self.letters_a, x, self.lora_a[...], p)
            y += self.scale * project(self.letters_b, low, self.lora_b[...], p)
        if self.bias is None:
            return y
        bias = self.bias[...]
        bias = bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return (y.astype(p.reduce) + bias.astype(p.reduce)).astype(y.dtype)


def fused_projections(
    x_BTD: Float[Array, "B T D"], linears: Sequence[Linear]
) -> list[Float[Array, "B T ..."]]:
    """Returns the output of each of `linears` for `x`, by one matmul where possible.

    Tensor parallelism shards the columns of each matrix; the columns of the
    concatenated matrix would lie on other devices, so each has a matmul of its own.
    """
    separate = sharding.axis_size("tensor") > 1
    D, kinds = x_BTD.shape[-1], {linear.matmul for linear in linears}
    if len(kinds) > 1 or (separate and kinds == {"compute"}):
        return [linear(x_BTD) for linear in linears]
    weights = [linear.weight[...] for linear in linears]
    ws = tuple(w.reshape(D, -1) for w in weights)
    if kinds == {"compute"}:
        ys = split_columns(project_all(x_BTD, ws, linears[0].precision), ws)
    elif separate or all(w.shape[1] > D for w in ws):
        # Each wide matrix fills the chip on its own. Concatenated, their gradients
        # could not be quantised and transposed by the kernel that computes them.
        pairs = zip(ws, linears, strict=True)
        ys = _project_low(
            "btd,df->btf", x_BTD, [([w], [linear]) for w, linear in pairs]
        )
    else:
        (y_BTF,) = _project_low("btd,df->btf", x_BTD, [(ws, linears)])
        ys = split_columns(y_BTF, ws)
    return [
        linear.add_adapter_and_bias(x_BTD, y.reshape(*y.shape[:2], *w.shape[1:]))
        for linear, y, w in zip(linears, ys, weights, strict=True)
    ]


def _project_low(
    letters: str,
    x: Float[Array, "..."],
    groups: Sequence[tuple[Sequence[Array], Sequence[Linear]]],
) -> tuple[Float[Array, "..."], ...]:
    """Returns the 8-bit product of `x` with the concatenated matrices of each group.

    Args:
      letters: the einsum of one product.
      x: activations.
      groups: for each group the matrices, and the layers that they are of.
    """
    ws = tuple(tuple(ws) for ws, _ in groups)
    first = groups[0][1][0]
    if first.matmul == "int8":
        return tuple(project_int8(letters, x, each, first.precision) for each in ws)
    expected = tuple(
        tuple(linear.amax[...] for linear in linears if linear.amax is not None)
        for _, linears in groups
    )
    return project_fp8(letters, x, ws, expected, first.precision)
