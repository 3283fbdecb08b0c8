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
    check,
    differences,
    mesh_size,
    problems,
    resolve,
    unable,
)
from scaletrain.config.schema import (
    FAMILIES,
    MAX_SPIKE_WINDOW,
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
    evaluated,
    leaves,
    named,
    quantised,
)

__all__ = [
    "FAMILIES",
    "MAX_SPIKE_WINDOW",
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
    "evaluated",
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
