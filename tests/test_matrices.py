"""The table of a decoder's matrices, against the decoder and the rooms that read it."""

import dataclasses
import pkgutil
import re

import jax
import jax.numpy as jnp
import pytest
import small
from flax import nnx

from scaletrain import config, matrices
from scaletrain.config import ModelConfig, PrecisionConfig
from scaletrain.hf import families
from scaletrain.models import Decoder
from scaletrain.sharding import RULES


@pytest.mark.parametrize("settings", [{}, {"mlp": "relu2"}, {"head": "tied"}])
def test_the_table_has_every_matrix_of_the_decoder(settings):
    model = dataclasses.replace(small.MODEL, **settings)
    make = lambda: Decoder(model, PrecisionConfig(), jax.random.key(0))  # noqa: E731
    params = nnx.to_flat_state(nnx.state(nnx.eval_shape(make)))
    sizes = {"/".join(p[:-1]): v.shape for p, v in params if p[-1] == "weight"}
    layers, head = (model.num_layers,), matrices.HEAD
    table = {
        f"blocks/{each.name}": layers + each.sizes(model)
        for each in matrices.of_layer(model)
    }
    if model.head == "untied":
        table[head.name] = head.sizes(model)
    assert sizes == table


def test_a_decoder_names_the_values_that_remat_can_keep():
    model = Decoder(small.MODEL, PrecisionConfig(), jax.random.key(0))
    ids = jnp.zeros((8, 8), jnp.int32)
    text = str(jax.make_jaxpr(lambda ids: model(ids, ids, ids))(ids))
    assert set(re.findall(r"name\[name=(\w+)\]", text)) == set(matrices.REMAT_NAMES)


def test_tensor_parallelism_splits_the_dims_that_the_rules_split():
    for dim in matrices.DIMS.values():
        assert (getattr(RULES, dim.axis) == "tensor") == dim.split, dim
    model = ModelConfig(d_model=8, num_heads=4, num_kv_heads=2, d_head=6, d_ff=10)
    shapes = {each.name: each.shape(model, 2) for each in matrices.LAYER.values()}
    assert shapes == {
        "attention/q": (8, 12),
        "attention/k": (8, 6),
        "attention/v": (8, 6),
        "attention/o": (12, 8),
        "mlp/gate": (8, 5),
        "mlp/up": (8, 5),
        "mlp/down": (5, 8),
    }


def test_every_module_with_a_family_is_listed():
    modules = {found.name for found in pkgutil.iter_modules(families.__path__)}
    assert modules - {"mapping", "normalise"} == set(families.FAMILIES)
    assert all(family.name == name for name, family in families.FAMILIES.items())
    assert ["", *families.FAMILIES] == list(config.FAMILIES)
