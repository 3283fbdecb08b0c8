"""The settings of a run: frozen dataclasses, each default written once.

A setting is one call of `setting`: its default and its story. Values that follow from
settings are properties beside them.

    run        what all of a run shares, its checkpoints and its evaluation
    model      the decoder and the way its layers are executed
    mesh       the axes over the devices
    precision  number formats
    lora       adapters
    optim      the optimizer and its schedule
    data       text and tokens
"""

from scaletrain.config.schema.data import DataConfig
from scaletrain.config.schema.lora import LoraConfig
from scaletrain.config.schema.mesh import AXES, BATCH_AXES, AxesConfig, MeshConfig
from scaletrain.config.schema.model import ModelConfig, RopeConfig
from scaletrain.config.schema.optim import MAX_SPIKE_WINDOW, OptimConfig
from scaletrain.config.schema.precision import PrecisionConfig
from scaletrain.config.schema.run import (
    FAMILIES,
    FIELDS,
    CheckpointConfig,
    EvalConfig,
    RunConfig,
)

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
    "PrecisionConfig",
    "RopeConfig",
    "RunConfig",
]
