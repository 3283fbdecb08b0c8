"""Settings: what they are (`schema`), how they arrive (`form`), what holds (`rules`).

Nothing here imports jax: a configuration can be built, printed and compared without
touching a device.
"""

from scaletrain.config.form import (
    from_config_dict,
    from_json,
    load,
    to_config_dict,
    to_json,
)
from scaletrain.config.rules import (
    REMAT_NAMES,
    check,
    differences,
    mesh_size,
    problems,
    resolve,
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
    leaves,
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
    "differences",
    "from_config_dict",
    "from_json",
    "leaves",
    "load",
    "mesh_size",
    "problems",
    "resolve",
    "to_config_dict",
    "to_json",
]
