"""Settings: what they are (`schema`), how they arrive (`form`), what holds (`rules`).

Nothing here imports jax: a configuration can be built, printed and compared without
touching a device.
"""

from scaletrain.config.rules import REMAT_NAMES, check, problems, resolve
from scaletrain.config.form import (
    from_config_dict,
    from_json,
    leaves,
    load,
    to_config_dict,
    to_json,
)
from scaletrain.config.schema import (
    AxesConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RunConfig,
)

__all__ = [
    "REMAT_NAMES",
    "AxesConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "RunConfig",
    "check",
    "from_config_dict",
    "from_json",
    "leaves",
    "load",
    "problems",
    "resolve",
    "to_config_dict",
    "to_json",
]
