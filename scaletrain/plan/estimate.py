"""Memory and time of a step worked out by hand: coarse, instant, for any device.

It decides which layouts are worth compiling, and is the whole answer where there is no
compiler. It knows no fragmentation, no layout padding and no fusion.
"""

import dataclasses
import functools
import math

import jax
from flax import nnx

from scaletrain import config, flops
from scaletrain.config import (
    AXES,
    LoraConfig,
    ModelConfig,
    PrecisionConfig,
    RunConfig,
)
from scaletrain.hardware.slices import Slice
from scaletrain.matrices import remat_widths
from scaletrain.models.transformer import Decoder

_MATMUL_EFFICIENCY = 0.6  # of the peak, over a whole step
# Of a score of plain attention: bytes held at once, times it is written or read.
_SCORE_BYTES, _SCORE_PASSES = 10, 4
# Copies of the parameters in float32 that an optimizer keeps.
_MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1, "adafactor": 0}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of one device."""

    by_class: dict[str, int]  # bytes
    step_time_s: float
    exposed_s: float  # of it, waiting for other devices

    @property
    def peak_bytes(self) -> int:
        """What is held at once."""
        return sum(self.by_class.values())


def estimate(run: RunConfig, slice_: Slice) -> Estimate:
    """Returns the estimate of a resolved run."""
    ways = {axis: run.mesh.size(axis) for axis in AXES}
    shards = ways["fsdp"] * ways["tensor"]
    rows = run.shard_rows
    tokens = rows * run.seq_len // ways["context"]
    count = parameters(run)
    held = 4 if run.precision.params == "float32" else 2
    by_class = {
        "parameters": held * count // shards,
        "optimizer": held * _MOMENTS[run.optim.name] * count // shards,
        "gradients": 4 * count // shards,
        "activations_and_temporaries": _activations(run, slice_, tokens, rows),
    }
    compute = _compute_s(run, slice_, rows)
    exposed = _communication_s(run, slice_, ways, tokens, count)
    by_class["other"] = 0
    return Estimate(by_class, compute + exposed, exposed)


def parameters(run: RunConfig) -> int:
    """Returns the number of parameters, counted in the model's own shapes."""
    return _parameters(run.model, run.lora)


@functools.cache
def _parameters(model: ModelConfig, lora: LoraConfig) -> int:
    shapes = nnx.eval_shape(
        lambda: Decoder(model, PrecisionConfig(), jax.random.key(0), lora)
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(shapes)))
    return sum(leaf.size for leaf in leaves)


def _activations(run: RunConfig, slice_: Slice, tokens: int, rows: int) -> int:
    """Returns bytes of what the backward pass waits for, and of the largest layer."""
    model, tensor = run.model, run.mesh.size("tensor")
    # Bytes a value of width D and of one that is split, with float32 copies: fitted
    # to what the compiler kept of Llama 8B on v5p:4x4x4 with and without a tensor axis.
    wide = sum(remat_widths(model).values())
    inside = tokens * (26 * model.d_model + 4 * wide // tensor)
    kept = inside
    if model.remat in ("full", "save"):
        saved = sum(remat_widths(model).get(name, 0) for name in model.remat_save)
        carried = 0 if "residual" in model.remat_offload else model.d_model
        kept = 2 * tokens * (carried + saved // tensor)
    layer = flops.matmul_weights(dataclasses.replace(model, vocab_size=0))
    gathered = 2 * 2 * layer // model.num_layers // tensor
    logits = 10 * tokens * model.vocab_size // tensor
    scores = _SCORE_BYTES * _scores(run, slice_, rows)
    return model.num_layers * kept + gathered + max(logits, inside + scores)


def _scores(run: RunConfig, slice_: Slice, rows: int) -> int:
    """Returns how many scores a device writes to memory at a time: no kernel does."""
    kernel = "splash" if slice_.is_tpu else "cudnn"
    asked = run.model.attention
    if asked == kernel or (asked == "auto" and not config.unable(run, kernel)):
        return 0
    pairs = run.seq_len**2 // run.mesh.size("context")
    return rows * run.model.num_heads // run.mesh.size("tensor") * pairs


def _compute_s(run: RunConfig, slice_: Slice, rows: int) -> float:
    """Returns seconds of arithmetic a step, recomputation and plain scores included."""
    causal, _ = flops.flops_per_token(run)
    again = 1 + _recomputed(run) / 3  # a backward pass is two forward ones
    arithmetic = causal * again * run.batch_size * run.seq_len / slice_.devices
    scores = _scores(run, slice_, rows) * run.accumulate_steps * run.model.num_layers
    moved = _SCORE_PASSES * _SCORE_BYTES * scores / slice_.chip.hbm_bytes_per_s
    return arithmetic / (_MATMUL_EFFICIENCY * slice_.chip.peak_flops) + moved


def _recomputed(run: RunConfig) -> float:
    """Returns the share of a layer's forward pass that the backward one does again."""
    model = run.model
    if model.remat == "none":
        return 0.0
    widths = remat_widths(model)
    cost = {name: model.d_model * width for name, width in widths.items()}
    cost["attention"] = run.seq_len * widths["attention"]
    cost["out"] = model.d_model * widths["attention"]  # of heads, back to D
    last = model.d_model * model.d_ff  # what it gives is the next layer's
    kept = {*model.remat_save, *model.remat_offload}
    if model.remat == "dots":
        kept = cost.keys() - {"attention"}
    again = sum(each for name, each in cost.items() if name not in kept)
    return again / (sum(cost.values()) + last)


def _communication_s(
    run: RunConfig, slice_: Slice, ways: dict[str, int], tokens: int, count: int
) -> float:
    """Returns seconds on the wire that arithmetic does not hide."""
    model = run.model
    weights = 2 * count // ways["tensor"]  # bytes of one gathering, in bfloat16
    passes = 2 if model.remat == "none" else 3
    if model.remat == "none" and model.layers == "unroll":
        passes = 1
    grads = 2 if run.precision.gradients == "float32" else 1  # of `weights`
    part = weights * (passes + grads) * (1 - 1 / ways["fsdp"])
    fsdp = part * run.accumulate_steps
    data = 2 * grads * weights / ways["fsdp"] * (1 - 1 / ways["data"])
    # A layer's: its residuals, eight times; its keys and values of whole sequences,
    # gathered twice, and their gradients, summed once.
    layers = model.num_layers * run.accumulate_steps
    residual = 2 * tokens * model.d_model * layers
    tensor = 8 * residual * (1 - 1 / ways["tensor"])
    kv = 2 * remat_widths(model)["key"] // ways["tensor"]
    context = 3 * 2 * tokens * kv * layers * (ways["context"] - 1)
    hidden = 0.7  # of the weights' way, by the layer before
    wire = (1 - hidden) * (fsdp + data) + tensor + context
    return wire / slice_.link_bytes_per_s


def factors(number: int) -> list[int]:
    """Returns every divisor of `number`, in order."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
