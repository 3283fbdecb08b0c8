"""The matrices of a decoder: one row for each, from which other modules derive facts.

FLOPs, adapters, 8-bit matmuls, the layout on the mesh, remat's names and the shapes
that `bench` times all follow from a row. Nothing here needs jax.
"""

import dataclasses
import fnmatch
import math
from typing import Any, NamedTuple

GATED = ("swiglu", "geglu")  # the values of model.mlp that have a gate


class Dim(NamedTuple):
    """A dim of a matrix.

    Args:
      letter: in einsum and einops.
      axis: the logical axis, see `sharding.Rules`.
      split: whether tensor parallelism splits it.
    """

    letter: str
    axis: str
    split: bool


# By the setting of `model` that is the size of the dim.
DIMS = {
    "d_model": Dim("d", "embed", split=False),
    "num_heads": Dim("n", "heads", split=True),
    "num_kv_heads": Dim("k", "kv_heads", split=True),
    "d_head": Dim("h", "head_dim", split=False),
    "d_ff": Dim("f", "ff", split=True),
    "vocab_size": Dim("v", "vocab", split=True),
}


@dataclasses.dataclass(frozen=True)
class Matrix:
    """A matrix that a decoder multiplies every token by.

    Args:
      name: its path in a layer, and the name that lora.targets and precision.targets
        match.
      ins: settings of `model`: the dims it sums over, the first ones of the parameter.
      outs: settings of `model`: the dims of its product.
      takes: name in model.remat_save of the value it multiplies; "" = none.
      gives: name in model.remat_save of its product; "" = none.
      only_with: values of model.mlp that have this matrix; () = all.
    """

    name: str
    ins: tuple[str, ...]
    outs: tuple[str, ...]
    takes: str = ""
    gives: str = ""
    only_with: tuple[str, ...] = ()

    @property
    def dims(self) -> tuple[Dim, ...]:
        """The dims of the parameter."""
        return tuple(DIMS[setting] for setting in (*self.ins, *self.outs))

    @property
    def letters(self) -> tuple[str, str]:
        """The einsum letters of the inputs and of the outputs, such as "d", "nh"."""
        ins, outs = (
            "".join(DIMS[setting].letter for setting in settings)
            for settings in (self.ins, self.outs)
        )
        return ins, outs

    def sizes(self, model: Any) -> tuple[int, ...]:
        """Returns the size of each dim of the parameter under a `ModelConfig`."""
        return tuple(getattr(model, setting) for setting in (*self.ins, *self.outs))

    def shape(self, model: Any, tensor: int = 1) -> tuple[int, int]:
        """Returns (inputs, outputs) of a shard under tensor parallelism.

        Args:
          model: a `ModelConfig`.
          tensor: devices of the group.
        """
        inputs, outputs = (
            math.prod(getattr(model, setting) for setting in settings)
            // (tensor if any(DIMS[setting].split for setting in settings) else 1)
            for settings in (self.ins, self.outs)
        )
        return inputs, outputs


_ROWS = (
    Matrix("attention/q", ("d_model",), ("num_heads", "d_head"), gives="query"),
    Matrix("attention/k", ("d_model",), ("num_kv_heads", "d_head"), gives="key"),
    Matrix("attention/v", ("d_model",), ("num_kv_heads", "d_head"), gives="value"),
    Matrix("attention/o", ("num_heads", "d_head"), ("d_model",), takes="attention"),
    Matrix("mlp/gate", ("d_model",), ("d_ff",), gives="mlp_gate", only_with=GATED),
    Matrix("mlp/up", ("d_model",), ("d_ff",), gives="mlp_up"),
    Matrix("mlp/down", ("d_ff",), ("d_model",)),
)
LAYER = {matrix.name: matrix for matrix in _ROWS}
HEAD = Matrix("head", ("d_model",), ("vocab_size",))  # neither adapted nor in 8 bits
# Intermediate values of a layer that remat can keep; models/ names exactly these.
REMAT_NAMES = (
    "residual",
    *(name for matrix in _ROWS for name in (matrix.takes, matrix.gives) if name),
)


def named(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of a layer's matrices that match one of `patterns`.

    Example:
      >>> named(("attention/[qk]", "mlp/up"))
      ('attention/q', 'attention/k', 'mlp/up')
    """
    return tuple(
        name for name in LAYER if any(fnmatch.fnmatch(name, p) for p in patterns)
    )


def of_layer(model: Any) -> tuple[Matrix, ...]:
    """Returns the matrices of a layer under a `ModelConfig`."""
    return tuple(
        matrix
        for matrix in _ROWS
        if not matrix.only_with or model.mlp in matrix.only_with
    )


def remat_widths(model: Any) -> dict[str, int]:
    """Returns the numbers per token of each value in REMAT_NAMES but "residual"."""
    widths = {}
    for matrix in of_layer(model):
        inputs, outputs = matrix.shape(model)
        widths |= {matrix.takes: inputs, matrix.gives: outputs}
    widths.pop("", None)
    return widths
