"""The settings of number formats, and of the matrices they are for."""

import dataclasses

from scaletrain.config.setting import free, setting, when
from scaletrain.matrices import LAYER, named

DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats: of storage, of products, of sums."""

    params: str = setting(
        "float32",
        "Format of the parameters and of the optimizer's state.",
        choices=DTYPES,
    )
    compute: str = free(
        "bfloat16",
        "Format of the inputs of matmuls and of the values between layers.",
        choices=DTYPES,
    )
    reduce: str = free("float32", "Format of softmax, norms and loss.", choices=DTYPES)
    gradients: str = free(
        "float32",
        "Format of the gradients of weights, also while they are summed over devices.",
        choices=DTYPES,
    )
    matmul: str = setting(
        "compute",
        "Format in which training multiplies the matrices of targets; compute = that "
        "of precision.compute.",
        choices=("compute", "fp8", "int8"),
    )
    scaling: str = setting(
        "current",
        "Scale of fp8 values: by the tensor's own largest value (current), or by "
        "those of the steps before (delayed).",
        choices=("current", "delayed"),
        used_when=when("precision.matmul", "fp8"),
    )
    targets: tuple[str, ...] = setting(
        ("attention/*", "mlp/*"),
        f"Matrices multiplied in 8 bits, of {', '.join(LAYER)}; * and ? stand for "
        "parts of a name.",
        used_when=when("precision.matmul", "fp8", "int8"),
    )

    @property
    def quantised(self) -> tuple[str, ...]:
        """The names of the matrices that are multiplied in 8 bits."""
        return named(self.targets) if self.matmul != "compute" else ()

    @property
    def plain(self) -> "PrecisionConfig":
        """The same without quantised matmuls."""
        return dataclasses.replace(
            self, matmul="compute", scaling="current", targets=PrecisionConfig().targets
        )
