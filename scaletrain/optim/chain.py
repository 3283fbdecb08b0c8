"""The optimizer of a run: a chain of optax transformations.

A new optimizer is a function of `(run, logical axes)` and a row in `_DIRECTIONS`.
"""

from typing import Any

import jax
import optax

from scaletrain.config import RunConfig
from scaletrain.optim import muon
from scaletrain.optim.guard import guarded
from scaletrain.optim.schedules import schedule
from scaletrain.sharding import is_matrix

Tree = Any  # nested dicts mirroring the parameters
MASKED = optax.MaskedNode()


def optimizer(run: RunConfig, logical: Tree) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of gradients summed over tokens into updates.

    Args:
      logical: the logical axes of each parameter; by them, matrices (the
        only ones that decay and that Muon updates) differ from norms, biases and
        embeddings.
    """
    o = run.optim

    def decays(axes: tuple[str, ...]) -> bool:
        embeddings = o.decay_embeddings == "yes"
        return is_matrix(axes) and (embeddings or not _is_embedding(axes))

    parts = [
        optax.clip_by_global_norm(o.clip_norm) if o.clip_norm else optax.identity(),
        _DIRECTIONS[o.name](run, logical),
        optax.add_decayed_weights(o.weight_decay, mask=_map_axes(decays, logical)),
        optax.scale_by_learning_rate(schedule(run)),
    ]
    return guarded(optax.chain(*parts), o.spike_sigma, o.spike_window)


def _is_embedding(axes: tuple[str, ...]) -> bool:
    return "vocab" in axes or "positions" in axes


def _takes_muon(axes: tuple[str, ...]) -> bool:
    """Whether Muon updates a parameter with these logical axes; Adam the others."""
    return is_matrix(axes) and not _is_embedding(axes) and "rank" not in axes


def _map_axes(function: Any, logical: Tree) -> Tree:
    return jax.tree.map(function, logical, is_leaf=lambda x: isinstance(x, tuple))


# Directions point uphill, as a gradient does, and are not scaled by the learning rate.


def _adamw(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    o = run.optim
    return optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps)


def _adafactor(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    return optax.chain(optax.adafactor(None), optax.scale(-1.0))


def _lion(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    return optax.scale_by_lion(b1=run.optim.b1, b2=run.optim.b2)


def _sgd(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    return optax.trace(decay=run.optim.b1)


def _muon(run: RunConfig, logical: Tree) -> optax.GradientTransformation:
    o = run.optim
    kinds = _map_axes(lambda axes: "muon" if _takes_muon(axes) else "adam", logical)
    matrices = _map_axes(lambda axes: axes if _takes_muon(axes) else MASKED, logical)
    return optax.partition(
        {
            "muon": muon.scale_by_muon(matrices, run.precision.compute),
            "adam": optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps, nesterov=True),
        },
        kinds,
    )


_DIRECTIONS = {
    "adamw": _adamw,
    "adafactor": _adafactor,
    "lion": _lion,
    "muon": _muon,
    "sgd": _sgd,
}
