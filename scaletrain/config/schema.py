"""The settings of a run: frozen dataclasses, each default written once.

Every field carries its unit and its off value. `choices` lists what a string may
be, `least` the smallest number allowed and `most` the largest; `path` is "local" where
a string is a path of this machine, "any" where it may be a URL too. `rules` holds every
value to them.
"""

import dataclasses
import fnmatch
from collections.abc import Iterator
from typing import Any

from scaletrain.matrices import GATED, LAYER


def setting(
    default: Any,
    *,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    path: str = "",
) -> Any:
    """Returns a dataclass field that knows the values it may take."""
    metadata = {"choices": choices, "least": least, "most": most, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary positions (arXiv 2104.09864) and how they are stretched."""

    base: float = setting(10_000.0, least=1.0)
    local_base: float = setting(0.0, least=0.0)  # where a window is used; 0 = base
    scaling: str = setting("none", choices=("none", "linear", "llama3"))
    factor: float = setting(1.0, least=1.0)  # times longer than it was trained for
    low_freq: float = setting(1.0, least=0.0)  # turns within original_len, see rates
    high_freq: float = setting(4.0, least=0.0)
    original_len: int = setting(8192, least=1)  # tokens it was trained for


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer and the way its layers are executed."""

    num_layers: int = setting(4, least=1)
    d_model: int = setting(256, least=1)
    num_heads: int = setting(4, least=1)
    num_kv_heads: int = setting(4, least=1)  # divides num_heads
    d_head: int = setting(64, least=2)  # even: rotary positions turn pairs
    d_ff: int = setting(1024, least=1)
    vocab_size: int = setting(512, least=2)  # rows of the table; >= the tokenizer's
    mlp: str = setting("swiglu", choices=(*GATED, "gelu", "relu2"))
    head: str = setting("untied", choices=("untied", "tied"))
    bias: str = setting("none", choices=("none", "qkv", "all"))
    norm: str = setting("rms", choices=("rms", "rms_plus_one", "layer"))
    norm_order: str = setting("pre", choices=("pre", "post", "both"))  # of a branch
    norm_eps: float = setting(1e-6, least=0.0)
    qk_norm: str = setting("none", choices=("none", "head", "all"))  # over what
    positions: str = setting("rope", choices=("rope", "learned"))
    max_positions: int = setting(0, least=0)  # it is made for; 0 = seq_len
    rope: RopeConfig = RopeConfig()
    sliding_window: int = setting(0, least=0)  # tokens a query sees; 0 = all before it
    global_every: int = setting(0, least=0)  # each n-th layer has no window; 0 = none
    embed_scale: float = setting(1.0, least=0.0)  # embeddings times this
    attention_scale: float = setting(0.0, least=0.0)  # scores times this; 0 = H^-0.5
    attention_soft_cap: float = setting(0.0, least=0.0)  # as logit_soft_cap, of scores
    logit_soft_cap: float = setting(0.0, least=0.0)  # cap * tanh(x / cap); 0 = off
    dropout: float = setting(0.0, least=0.0, most=0.95)  # of each residual branch
    layers: str = setting("scan", choices=("scan", "unroll"))
    remat: str = setting("none", choices=("none", "full", "dots", "save", "auto"))
    remat_save: tuple[str, ...] = ()  # names kept when remat is "save"
    remat_offload: tuple[str, ...] = ()  # names kept in the host's memory instead
    attention: str = setting("auto", choices=("auto", "xla", "splash", "cudnn"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AxesConfig:
    """Sizes of the six mesh axes; 1 = unused, -1 = whatever devices are left."""

    data: int = setting(1, least=-1)  # replicas of the parameters
    fsdp: int = setting(1, least=-1)  # parameters and batch split
    expert: int = setting(1, least=-1)  # experts split
    context: int = setting(1, least=-1)  # tokens of a sequence split
    tensor: int = setting(1, least=-1)  # heads and hidden units split
    stage: int = setting(1, least=-1)  # layers split


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig(AxesConfig):
    """Axes inside a slice, and under `dcn` the same axes across slices or hosts."""

    dcn: AxesConfig = AxesConfig()


DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Number formats: what is stored, what is multiplied, what is summed."""

    params: str = setting("float32", choices=DTYPES)  # parameters and optimizer state
    compute: str = setting("bfloat16", choices=DTYPES)  # matmul inputs, activations
    reduce: str = setting("float32", choices=DTYPES)  # softmax, norms, loss
    gradients: str = setting("float32", choices=DTYPES)  # of weights, and over devices
    matmul: str = setting("compute", choices=("compute", "fp8", "int8"))  # of `targets`
    scaling: str = setting("current", choices=("current", "delayed"))  # fp8, by whose
    targets: tuple[str, ...] = ("attention/*", "mlp/*")  # names, * and ? allowed

    @property
    def plain(self) -> "PrecisionConfig":
        """The same without quantised matmuls."""
        return dataclasses.replace(
            self, matmul="compute", scaling="current", targets=PrecisionConfig().targets
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (arXiv 2106.09685); the weights they adapt stay frozen."""

    rank: int = setting(0, least=0)  # 0 = train every weight
    alpha: float = setting(16.0, least=0.0)  # the update is scaled by alpha / rank
    targets: tuple[str, ...] = ("attention/*", "mlp/*")  # names, * and ? allowed


MAX_SPIKE_WINDOW = 1024  # updates the optimizer's state remembers


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule and what happens to a gradient before it."""

    name: str = setting("adamw", choices=("adamw", "adafactor", "lion", "muon", "sgd"))
    learning_rate: float = setting(3e-4, least=0.0)  # at its peak
    schedule: str = setting(
        "cosine", choices=("constant", "cosine", "linear", "wsd", "inverse_sqrt")
    )
    warmup_steps: int = setting(0, least=0)  # linear from 0
    decay_steps: int = setting(0, least=0)  # last steps of "wsd"; 0 = a fifth of all
    # Last rate / peak: "wsd" has it in the last step, "cosine" and "linear" would in
    # the step after the last.
    final_ratio: float = setting(0.1, least=0.0, most=1.0)
    b1: float = setting(0.9, least=0.0, most=1.0)  # first moment; sgd's momentum
    b2: float = setting(0.95, least=0.0, most=1.0)  # second moment
    eps: float = setting(1e-8, least=0.0)
    weight_decay: float = setting(0.1, least=0.0)  # 0 = off
    decay_embeddings: str = setting("no", choices=("no", "yes"))
    clip_norm: float = setting(1.0, least=0.0)  # global norm; 0 = off
    z_loss: float = setting(0.0, least=0.0)  # weight of log(Z)^2; 0 = off
    accumulate: str = setting("microbatch", choices=("microbatch", "multi_steps"))
    spike_sigma: float = setting(0.0, least=0.0)  # std above the mean; 0 = no limit
    spike_window: int = setting(128, least=8, most=MAX_SPIKE_WINDOW)  # updates
    max_skipped_steps: int = setting(5, least=1)  # in a row before going back
    max_rollbacks: int = setting(3, least=0)  # of a run; 0 = stop instead


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = setting("stdlib", choices=("stdlib", "files", "tfds", "synthetic"))
    # files: path or glob, local or fsspec; tfds: name[/config][:version]
    path: str = setting("", path="any")
    text_field: str = "text"  # column of json, csv, parquet or tfds that holds the text
    format: str = setting("text", choices=("text", "chat"))  # of what a row holds
    split: str = "train"  # of a tfds data set
    # bytes | bpe | path of a tokenizer.json or a .model file
    tokenizer: str = setting("bytes", path="any")
    end_of_text: str = ""  # that token's spelling in a tokenizer file; "" = find it
    validation_fraction: float = setting(0.05, least=0.0, most=0.5)  # of documents
    cache_dir: str = setting("", path="local")  # "" = the user's cache folder


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state is saved and what is kept."""

    every_steps: int = setting(0, least=0)  # 0 = only after the last step
    every_minutes: float = setting(
        0.0, least=0.0
    )  # one that goes with the next; 0 = no
    keep: int = setting(3, least=1)  # newest checkpoints of every_steps kept
    keep_every_steps: int = setting(0, least=0)  # multiples kept for good; 0 = none
    on_damage: str = setting("stop", choices=("stop", "previous"))  # when resuming
    max_failed_saves: int = setting(3, least=0)  # in a row before giving up


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How much of its split an evaluation reads."""

    num_batches: int = setting(0, least=0)  # of batch_size; 0 = the whole split


# Published families that `scaletrain.families` reads and writes, each in a module of
# its name. A model without a family of its own is offered to them in this order.
FAMILIES = (
    "", "llama", "mistral", "qwen2", "qwen3", "olmo2", "phi3", "gemma2", "gemma3",
    "gpt2",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run does."""

    num_steps: int = setting(100, least=1)  # optimizer steps
    batch_size: int = setting(8, least=1)  # sequences per optimizer step, all devices
    seq_len: int = setting(256, least=2)  # tokens
    accumulate_steps: int = setting(1, least=1)  # parts a batch is computed in
    log_every_steps: int = setting(10, least=1)
    eval_every_steps: int = setting(0, least=0)  # 0 = only after the last step
    seed: int = setting(0, least=0, most=2**32 - 1)
    # WORKDIR[@STEP] whose weights a new run starts with; without a step the newest
    init_from: str = setting("", path="local")
    watchdog_s: float = setting(3600.0, least=0.0)  # longest phase; 0 = do not watch
    family: str = setting("", choices=FAMILIES)  # an export's; "" = the first that fits
    model: ModelConfig = ModelConfig()
    mesh: MeshConfig = MeshConfig(data=-1)
    precision: PrecisionConfig = PrecisionConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    data: DataConfig = DataConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()


def adapted(lora: LoraConfig) -> tuple[str, ...]:
    """Returns the names of matrices that get adapters."""
    return named(lora.targets) if lora.rank else ()


def evaluated(run: RunConfig) -> RunConfig:
    """Returns `run` as it is evaluated: without quantised matmuls."""
    return dataclasses.replace(run, precision=run.precision.plain)


def quantised(precision: PrecisionConfig) -> tuple[str, ...]:
    """Returns the names of matrices that are multiplied in 8 bits."""
    return named(precision.targets) if precision.matmul != "compute" else ()


def named(patterns: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the names of matrices that one of `patterns` is for."""
    return tuple(
        name for name in LAYER if any(fnmatch.fnmatch(name, p) for p in patterns)
    )


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (dotted path, dataclass field, value) of every setting, in order."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value
