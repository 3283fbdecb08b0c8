"""A stack of equal layers: how it is created, rematerialised and run.

The layers are one module whose parameters carry a leading layer dim. A walk runs the
layers one after another: it calls `layer(x, inputs) -> (x, aux)` with each layer's
slice of `inputs`, and stacks `aux`. Another walk (pipeline stages, say) is a function
and a row in `WALKS`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from scaletrain.config import ModelConfig

Tree = Any
Layer = Callable[[jax.Array, Tree], tuple[jax.Array, Tree]]


def stacked(make: Callable[[jax.Array], nnx.Module], keys: jax.Array) -> nnx.Module:
    """Returns one module whose parameters hold a layer for each key, stacked."""
    graphdef, state = jax.vmap(lambda key: nnx.split(make(key)))(keys)
    for _, leaf in nnx.to_flat_state(state):
        leaf.set_metadata("logical", ("layers", *leaf.get_metadata("logical")))
    return nnx.merge(graphdef, state)


def rematerialised(model: ModelConfig, layer: Layer) -> Layer:
    """Returns `layer` under the rematerialisation policy of `model.remat`.

    Its backward pass recomputes all values that the policy does not save.
    """
    policies = jax.checkpoint_policies
    if model.remat in ("none", "auto"):  # auto: where nothing is differentiated
        return layer
    policy = {
        "full": policies.nothing_saveable,
        "dots": policies.dots_with_no_batch_dims_saveable,
        "save": policies.save_and_offload_only_these_names(
            names_which_can_be_saved=list(model.remat_save),
            names_which_can_be_offloaded=list(model.remat_offload),
            offload_src="device",
            offload_dst="pinned_host",
        ),
    }[model.remat]
    # Inside a scan nothing can be merged across iterations; preventing it would only
    # put barriers in XLA's way.
    return jax.checkpoint(layer, policy=policy, prevent_cse=model.layers == "unroll")


def _scan(layer: Layer, x: jax.Array, inputs: Tree) -> tuple[jax.Array, Tree]:
    return jax.lax.scan(layer, x, inputs)


def _unroll(layer: Layer, x: jax.Array, inputs: Tree) -> tuple[jax.Array, Tree]:
    layer = jax.jit(layer)  # traced and lowered once for all layers
    layers = jax.tree.leaves(inputs)[0].shape[0]
    # Slices of one split: their gradients are joined by one concatenation.
    slices = jax.tree.map(lambda leaf: jax.lax.split(leaf, (1,) * layers), inputs)
    aux = []
    for i in range(layers):
        one = jax.tree.map(
            lambda leaf, split, i=i: split[i].reshape(leaf.shape[1:]), inputs, slices
        )
        x, layer_aux = layer(x, one)
        aux.append(layer_aux)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *aux)


WALKS = {"scan": _scan, "unroll": _unroll}
