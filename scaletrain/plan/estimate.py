"""The analytic estimate of a step's memory and time: coarse, instant, for any device.

The estimate decides which layouts are worth compiling, and stands for the compiler's
report where no compiler is installed. It ignores fragmentation, padding and fusion.
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
# Of one score of plain attention: bytes that exist at once, and its writes and reads.
_SCORE_BYTES, _SCORE_PASSES = 10, 4
# Copies of the parameters in float32 that an optimizer keeps.
_MOMENTS = {"adamw": 2, "muon": 2, "lion": 1, "sgd": 1, "adafactor": 0}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The estimated memory and step time of one device."""

    by_class: dict[str, int]  # bytes
    step_time_s: float
    exposed_s: float  # part of `step_time_s`: the device waits for other devices

    @property
    def peak_bytes(self) -> int:
        """The bytes that are in use at the same time."""
        return sum(self.by_class.values())


def estimate(run: RunConfig, slice_: Slice) -> Estimate:
    """Returns the estimate of a run that is resolved for the devices of a slice."""
    sizes = {axis: run.mesh.size(axis) for axis in AXES}
    num_shards = sizes["fsdp"] * sizes["tensor"]
    rows = run.shard_rows
    tokens = rows * run.seq_len // sizes["context"]
    count = parameters(run)
    itemsize = 4 if run.precision.params == "float32" else 2
    by_class = {
        "parameters": itemsize * count // num_shards,
        "optimizer": itemsize * _MOMENTS[run.optim.name] * count // num_shards,
        "gradients": 4 * count // num_shards,
        "activations_and_temporaries": _activations(run, slice_, tokens, rows),
    }
    compute = _compute_s(run, slice_, rows)
    exposed = _communication_s(run, slice_, sizes, tokens, count)
    by_class["other"] = 0
    return Estimate(by_class, compute + exposed, exposed)


def parameters(run: RunConfig) -> int:
    """Returns the number of parameters, counted in the shapes of the model itself."""
    return _parameters(run.model, run.lora)


@functools.cache
def _parameters(model: ModelConfig, lora: LoraConfig) -> int:
    shapes = nnx.eval_shape(
        lambda: Decoder(model, PrecisionConfig(), jax.random.key(0), lora)
    )
    leaves = jax.tree.leaves(nnx.to_pure_dict(nnx.state(shapes)))
    return sum(leaf.size for leaf in leaves)


def _activations(run: RunConfig, slice_: Slice, tokens: int, rows: int) -> int:
    """Returns the bytes of the residuals of all layers, and of the largest temporaries.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices, which decide on the attention kernel.
      tokens: of a micro-batch on one device.
      rows: sequences of a micro-batch on one device.
    """
    model, tensor = run.model, run.mesh.size("tensor")
    # 26 bytes for each of a token's values of width D and 4 for each of those that a
    # tensor axis splits, with float32 copies: fitted to the compiler's residuals of
    # Llama 8B on v5p:4x4x4 with and without a tensor axis.
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
    """Returns the number of attention scores that a layer writes to memory.

    An attention kernel writes none.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices, which decide on the kernel.
      rows: sequences of a micro-batch on one device.
    """
    kernel = "splash" if slice_.is_tpu else "cudnn"
    attention = run.model.attention
    if attention == kernel or (attention == "auto" and not config.unable(run, kernel)):
        return 0
    pairs = run.seq_len**2 // run.mesh.size("context")
    return rows * run.model.num_heads // run.mesh.size("tensor") * pairs


def _compute_s(run: RunConfig, slice_: Slice, rows: int) -> float:
    """Returns the seconds of arithmetic in a step, with recomputation and scores."""
    causal, _ = flops.flops_per_token(run)
    # A step is three forward passes, for a backward pass takes as long as two.
    recomputation = 1 + _recomputed(run) / 3
    arithmetic = causal * recomputation * run.batch_size * run.seq_len / slice_.devices
    scores = _scores(run, slice_, rows) * run.accumulate_steps * run.model.num_layers
    traffic = _SCORE_PASSES * _SCORE_BYTES * scores / slice_.chip.hbm_bytes_per_s
    return arithmetic / (_MATMUL_EFFICIENCY * slice_.chip.peak_flops) + traffic


def _recomputed(run: RunConfig) -> float:
    """Returns the fraction of a layer's forward pass that the backward pass repeats."""
    model = run.model
    if model.remat == "none":
        return 0.0
    widths = remat_widths(model)
    cost = {name: model.d_model * width for name, width in widths.items()}
    cost["attention"] = run.seq_len * widths["attention"]
    cost["out"] = model.d_model * widths["attention"]  # the output projection
    # The down projection is not repeated: its result is the input of the next layer.
    down = model.d_model * model.d_ff
    kept = {*model.remat_save, *model.remat_offload}
    if model.remat == "dots":
        kept = cost.keys() - {"attention"}
    again = sum(each for name, each in cost.items() if name not in kept)
    return again / (sum(cost.values()) + down)


def _communication_s(
    run: RunConfig, slice_: Slice, sizes: dict[str, int], tokens: int, count: int
) -> float:
    """Returns the seconds on the wire that arithmetic does not hide.

    Args:
      run: resolved for the devices of the slice.
      slice_: the devices and their links.
      sizes: of the mesh axes.
      tokens: of a micro-batch on one device.
      count: the number of parameters.
    """
    model = run.model
    weights = 2 * count // sizes["tensor"]  # bytes of one all-gather, in bfloat16
    # All-gathers of the weights: forward, backward, and for the recomputation.
    passes = 2 if model.remat == "none" else 3
    if model.remat == "none" and model.layers == "unroll":
        passes = 1
    grads = 2 if run.precision.gradients == "float32" else 1  # of `weights`
    micro_batch = weights * (passes + grads) * (1 - 1 / sizes["fsdp"])
    fsdp = micro_batch * run.accumulate_steps
    data = 2 * grads * weights / sizes["fsdp"] * (1 - 1 / sizes["data"])
    # Of each layer: its residuals, eight times; the keys and values of complete
    # sequences, gathered twice, and their gradients, summed once.
    layers = model.num_layers * run.accumulate_steps
    residual = 2 * tokens * model.d_model * layers
    tensor = 8 * residual * (1 - 1 / sizes["tensor"])
    kv = 2 * remat_widths(model)["key"] // sizes["tensor"]
    context = 3 * 2 * tokens * kv * layers * (sizes["context"] - 1)
    hidden = 0.7  # of the weights' transfers, behind the layer before
    wire = (1 - hidden) * (fsdp + data) + tensor + context
    return wire / slice_.link_bytes_per_s


def factors(number: int) -> list[int]:
    """Returns the divisors of `number`, the smallest first."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
