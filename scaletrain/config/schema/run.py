"""The settings of a run: its own, and one group for each subject."""

import dataclasses
import math

from scaletrain.config.schema.data import DataConfig
from scaletrain.config.schema.lora import LoraConfig
from scaletrain.config.schema.mesh import BATCH_AXES, MeshConfig
from scaletrain.config.schema.model import ModelConfig
from scaletrain.config.schema.optim import OptimConfig
from scaletrain.config.schema.precision import PrecisionConfig
from scaletrain.config.setting import free, leaves, setting, when

# Published families that `scaletrain.families` can read and write.
FAMILIES = (
    "", "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3",
    "gpt2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and which checkpoints stay."""

    every_steps: int = free(
        0,
        "Optimizer steps between checkpoints; 0 = only one after the last step.",
        least=0,
    )
    every_minutes: float = free(
        0.0,
        "Minutes between temporary checkpoints, each deleted when the next one is "
        "complete; 0 = off.",
        least=0.0,
    )
    keep: int = free(
        3, "Number of the newest checkpoints of every_steps that stay.", least=1
    )
    keep_every_steps: int = free(
        0,
        "Checkpoints at multiples of these steps stay for good; a multiple of "
        "every_steps; 0 = none.",
        least=0,
    )
    on_damage: str = free(
        "stop",
        "If the newest checkpoint is damaged when a run is resumed: stop, or set it "
        "aside and go on from the one before (previous).",
        choices=("stop", "previous"),
    )
    max_failed_saves: int = free(
        3, "Saves in a row that may fail before the run ends; 0 = none.", least=0
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much of its split an evaluation reads."""

    num_batches: int = free(
        0,
        "Batches of batch_size sequences that an evaluation reads; 0 = the whole "
        "split.",
        least=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    num_steps: int = free(100, "Optimizer steps of the run.", least=1)
    batch_size: int = setting(
        8, "Sequences per optimizer step, on all devices together.", least=1
    )
    seq_len: int = setting(256, "Tokens of a sequence.", least=2)
    accumulate_steps: int = free(
        1,
        "Micro-batches that a batch is computed in, one after another; divides "
        "batch_size; 1 = off.",
        least=1,
    )
    log_every_steps: int = free(10, "Optimizer steps between logged ones.", least=1)
    eval_every_steps: int = free(
        0, "Optimizer steps between evaluations; 0 = only after the last step.", least=0
    )
    seed: int = setting(
        0, "Number that everything random follows from.", least=0, most=2**32 - 1
    )
    init_from: str = setting(
        "",
        "WORKDIR[@STEP] with the weights that a new run begins with, without a step "
        "the newest; '' = random weights.",
        path="local",
        resume=when("lora.rank", 0),
    )
    watchdog_s: float = free(
        3600.0,
        "Seconds after which a phase of the run is taken to hang, and the run ends "
        "with exit code 75; 0 = do not watch.",
        least=0.0,
    )
    family: str = free(
        "",
        "Published family that the model is exported as; '' = the first that fits.",
        choices=FAMILIES,
    )
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=lambda: MeshConfig(data=-1))
    precision: PrecisionConfig = dataclasses.field(default_factory=PrecisionConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    @property
    def batch_shards(self) -> int:
        """Shards of a batch along its rows."""
        return math.prod(self.mesh.size(axis) for axis in BATCH_AXES)

    @property
    def micro_batch_rows(self) -> int:
        """Sequences of a micro-batch, on all devices together."""
        return self.batch_size // self.accumulate_steps

    @property
    def shard_rows(self) -> int:
        """Sequences of a micro-batch in one of its shards."""
        return self.micro_batch_rows // self.batch_shards

    @property
    def for_evaluation(self) -> "RunConfig":
        """The same run as it is evaluated: without quantised matmuls."""
        return dataclasses.replace(self, precision=self.precision.plain)


# The field of every setting, by its dotted path.
FIELDS = {path: field for path, field, _ in leaves(RunConfig())}
