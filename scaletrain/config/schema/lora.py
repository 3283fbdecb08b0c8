"""The settings of adapters."""

import dataclasses

from scaletrain.config.setting import setting, unless
from scaletrain.matrices import LAYER, named


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685); the weights they adapt stay frozen."""

    rank: int = setting(
        0, "Rank of the adapters; 0 = none, every weight is trained.", least=0
    )
    alpha: float = setting(
        16.0,
        "The product of an adapter is multiplied by alpha / rank.",
        least=0.0,
        used_when=unless("lora.rank", 0),
    )
    targets: tuple[str, ...] = setting(
        ("attention/*", "mlp/*"),
        f"Matrices with an adapter, of {', '.join(LAYER)}; * and ? stand for parts "
        "of a name.",
        used_when=unless("lora.rank", 0),
    )

    @property
    def adapted(self) -> tuple[str, ...]:
        """The names of the matrices that have an adapter."""
        return named(self.targets) if self.rank else ()
