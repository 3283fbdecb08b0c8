"""Settings: what they are (`schema`), how they arrive (`form`), what holds (`rules`).

Nothing here imports jax: a configuration can be built, printed and compared without
touching a device.
"""

from scaletrain.config.form import (
    from_config_dict,
    from_json,
    load,
    override,
    replaced,
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
    unable,
)
from scaletrain.config.schema import (
    FAMILIES,
    GATED,
    LINEARS,
    AxesConfig,
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    PrecisionConfig,
    RopeConfig,
    RunConfig,
    adapted,
    leaves,
    named,
    quantised,
)

__all__ = [
    "FAMILIES",
    "GATED",
    "LINEARS",
    "REMAT_NAMES",
    "AxesConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "PrecisionConfig",
    "RopeConfig",
    "RunConfig",
    "adapted",
    "check",
    "differences",
    "from_config_dict",
    "from_json",
    "leaves",
    "load",
    "mesh_size",
    "named",
    "override",
    "problems",
    "quantised",
    "replaced",
    "resolve",
    "to_config_dict",
    "to_json",
    "unable",
]
