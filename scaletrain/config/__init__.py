"""Settings: their definitions, the ways to give them, and the rules between them.

    setting     a field with its metadata: doc, range, use, resume
    schema      the settings
    experiment  an experiment file
    load        a file and overrides to a checked run; a run to text
    overrides   other values for some settings, as text and as values
    rules       the rules between settings
    attention   the settings that each attention kernel can run
    resume      settings that differ between two attempts at a run
    explain     the metadata of settings, for a terminal and for docs/

Nothing here imports jax: a configuration can be built, printed and compared without
touching a device.
"""

from scaletrain.config.attention import unable
from scaletrain.config.experiment import file_and_argument
from scaletrain.config.load import (
    from_config_dict,
    from_json,
    load,
    override,
    to_config_dict,
    to_json,
)
from scaletrain.config.overrides import Overrides, applied, changes, flags, whole_number
from scaletrain.config.resume import differences
from scaletrain.config.rules import check, is_possible, problems, resolve
from scaletrain.config.schema import (
    AXES,
    BATCH_AXES,
    FAMILIES,
    FIELDS,
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
)
from scaletrain.config.setting import get, leaves

__all__ = [
    "AXES",
    "BATCH_AXES",
    "FAMILIES",
    "FIELDS",
    "MAX_SPIKE_WINDOW",
    "AxesConfig",
    "CheckpointConfig",
    "DataConfig",
    "EvalConfig",
    "LoraConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimConfig",
    "Overrides",
    "PrecisionConfig",
    "RopeConfig",
    "RunConfig",
    "applied",
    "changes",
    "check",
    "differences",
    "file_and_argument",
    "flags",
    "from_config_dict",
    "from_json",
    "get",
    "is_possible",
    "leaves",
    "load",
    "override",
    "problems",
    "resolve",
    "to_config_dict",
    "to_json",
    "unable",
    "whole_number",
]
