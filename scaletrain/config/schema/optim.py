"""The settings of the optimizer."""

import dataclasses

from scaletrain.config.setting import free, setting, unless, when

MAX_SPIKE_WINDOW = 1024  # updates the optimizer's state remembers


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its schedule, and what happens to a gradient before it."""

    name: str = setting(
        "adamw",
        "The optimizer; with muon, parameters that are no matrices of a layer are "
        "updated by Adam.",
        choices=("adamw", "adafactor", "lion", "muon", "sgd"),
    )
    learning_rate: float = free(3e-4, "Learning rate at its peak.", least=0.0)
    schedule: str = free(
        "cosine",
        "Course of the learning rate after warm-up; wsd stays at the peak and falls "
        "linearly in the end.",
        choices=("constant", "cosine", "linear", "wsd", "inverse_sqrt"),
    )
    warmup_steps: int = free(
        0,
        "Optimizer steps in which the learning rate rises linearly to its peak; 0 = "
        "none.",
        least=0,
    )
    decay_steps: int = free(
        0,
        "Last optimizer steps, in which wsd falls; 0 = a fifth of num_steps.",
        least=0,
        used_when=when("optim.schedule", "wsd"),
    )
    final_ratio: float = free(
        0.1,
        "Final learning rate / peak: wsd has it in the last step, cosine and linear "
        "would have it in the step after.",
        least=0.0,
        most=1.0,
        used_when=when("optim.schedule", "cosine", "linear", "wsd"),
    )
    b1: float = free(
        0.9,
        "Share of the old value in the average of gradients (first moment); of sgd "
        "the momentum.",
        least=0.0,
        most=1.0,
        used_when=when("optim.name", "adamw", "lion", "muon", "sgd"),
    )
    b2: float = free(
        0.95,
        "Share of the old value in the average of squared gradients (second moment); "
        "of lion in that of gradients.",
        least=0.0,
        most=1.0,
        used_when=when("optim.name", "adamw", "lion", "muon"),
    )
    eps: float = free(
        1e-8,
        "Added to the root of the second moment.",
        least=0.0,
        used_when=when("optim.name", "adamw", "muon"),
    )
    weight_decay: float = free(
        0.1,
        "An update takes this share, times the learning rate, off every matrix; 0 = "
        "off.",
        least=0.0,
    )
    decay_embeddings: str = free(
        "no",
        "Whether embeddings decay as other matrices do.",
        choices=("no", "yes"),
        used_when=unless("optim.weight_decay", 0),
    )
    clip_norm: float = free(
        1.0,
        "Largest global norm of a gradient, to which larger ones are scaled down; 0 = "
        "off.",
        least=0.0,
    )
    z_loss: float = free(
        0.0,
        "Weight of log(Z)^2 in the loss, Z being the sum that softmax divides by; 0 = "
        "off.",
        least=0.0,
    )
    accumulate: str = free(
        "microbatch",
        "Way of adding up micro-batches: in place (microbatch), or with one gradient "
        "more in memory (multi_steps).",
        choices=("microbatch", "multi_steps"),
    )
    spike_sigma: float = free(
        0.0,
        "An update is skipped if its loss or gradient norm is this many standard "
        "deviations above the mean; 0 = no limit.",
        least=0.0,
    )
    spike_window: int = free(
        128,
        "Updates that mean and standard deviation are of.",
        least=8,
        most=MAX_SPIKE_WINDOW,
        used_when=unless("optim.spike_sigma", 0),
    )
    max_skipped_steps: int = free(
        5,
        "Updates skipped in a row after which the run goes back to a checkpoint.",
        least=1,
    )
    max_rollbacks: int = free(
        3,
        "Times that a run may go back to a checkpoint; 0 = it stops instead.",
        least=0,
    )
