"""Memory and time of a step worked out by hand: coarse, instant, for any device.

It decides which layouts are worth compiling, and is the whole answer where there is no
compiler. It knows no fragmentation, no layout padding and no fusion.
"""

import dataclasses
import math

from scaletrain import metrics
from scaletrain.config import GATED, RunConfig
from scaletrain.mesh import AXES
from scaletrain.plan.slices import Slice

_MATMUL_EFFICIENCY = 0.6  # of the peak, over a whole step
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
    ways = {name: _size(run, name) for name in AXES}
    shards = ways["fsdp"] * ways["tensor"]
    rows = run.batch_size // run.accumulate_steps // (ways["data"] * ways["fsdp"])
    tokens = rows * run.seq_len // ways["context"]
    count = parameters(run)
    held = 4 if run.precision.params == "float32" else 2
    by_class = {
        "parameters": held * count // shards,
        "optimizer": held * _MOMENTS[run.optim.name] * count // shards,
        "gradients": 4 * count // shards,
        "activations": _activations(run, tokens, rows, ways["tensor"]),
    }
    compute = _compute_s(run, slice_)
    exposed = _communication_s(run, slice_, ways, tokens, count)
    return Estimate(by_class, compute + exposed, exposed)


def _size(run: RunConfig, axis: str) -> int:
    return getattr(run.mesh, axis) * getattr(run.mesh.dcn, axis)


def parameters(run: RunConfig) -> int:
    """Returns the number of weights, norms and biases left out."""
    model = run.model
    tied = model.d_model * model.vocab_size if model.head == "untied" else 0
    return metrics.matmul_weights(model) + tied


def _activations(run: RunConfig, tokens: int, rows: int, tensor: int) -> int:
    """Returns bytes of what the backward pass waits for, and of the largest layer."""
    model = run.model
    D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.d_head
    wide = (3 if model.mlp in GATED else 2) * model.d_ff
    # Bytes a value of width D and of one that is split, with float32 copies: fitted
    # to what the compiler kept of Llama 8B on v5p:4x4x4 with and without a tensor axis.
    inside = tokens * (26 * D + 4 * ((2 * N + 2 * K) * H + wide) // tensor)
    kept = {
        "none": inside,
        "dots": inside,
        "save": 2 * tokens * (D + N * H // tensor),
        "full": 2 * tokens * D,
    }[model.remat]
    layer = metrics.matmul_weights(dataclasses.replace(model, vocab_size=0))
    gathered = 2 * 2 * layer // model.num_layers // tensor
    logits = 10 * tokens * model.vocab_size // tensor
    scores = 10 * rows * N // tensor * run.seq_len**2 if _plain(run) else 0
    return model.num_layers * kept + gathered + max(logits, inside + scores)


def _plain(run: RunConfig) -> bool:
    """Whether attention writes its scores to memory: no kernel does."""
    return run.model.attention == "xla"


def _compute_s(run: RunConfig, slice_: Slice) -> float:
    """Returns seconds of arithmetic a step, recomputation included."""
    causal, _ = metrics.flops_per_token(run)
    again = {"none": 1, "dots": 1.05, "save": 1.25, "full": 4 / 3}[run.model.remat]
    flops = causal * again * run.batch_size * run.seq_len / slice_.devices
    return flops / (_MATMUL_EFFICIENCY * slice_.peak_flops)


def _communication_s(
    run: RunConfig, slice_: Slice, ways: dict[str, int], tokens: int, count: int
) -> float:
    """Returns seconds on the wire that arithmetic does not hide."""
    weights = 2 * count // ways["tensor"]  # bytes of one gathering, in bfloat16
    passes = (3 if run.model.remat == "full" else 2) * run.accumulate_steps
    fsdp = (weights * passes + 2 * weights) * (1 - 1 / ways["fsdp"])
    data = 4 * weights / ways["fsdp"] * (1 - 1 / ways["data"])
    residual = 2 * tokens * run.model.d_model * run.accumulate_steps
    tensor = 8 * run.model.num_layers * residual * (1 - 1 / ways["tensor"])
    hidden = 0.7  # of the weights' way, by the layer before
    wire = (1 - hidden) * (fsdp + data) + tensor
    return wire / slice_.link_bytes_per_s


def factors(number: int) -> list[int]:
    """Returns every divisor of `number`, in order."""
    small = [i for i in range(1, math.isqrt(number) + 1) if number % i == 0]
    return sorted({*small, *(number // i for i in small)})
