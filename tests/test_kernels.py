"""Hand-written kernels, interpreted, against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaletrain import mesh
from scaletrain.config import MeshConfig
from scaletrain.kernels.norm import add_norm

EPS = 1e-6


def plain(x_BTD, branch_BTD, scale_D):
    """Returns what the kernel promises, in the precision of its inputs."""
    sum_BTD = x_BTD if branch_BTD is None else x_BTD + branch_BTD
    mean_BT1 = jnp.mean(sum_BTD * sum_BTD, axis=-1, keepdims=True)
    return sum_BTD, sum_BTD / jnp.sqrt(mean_BT1 + EPS) * scale_D[None, None]


def drawn(width, *, alone):
    """Returns the inputs and the cotangents of both results, in float64."""
    rng = np.random.default_rng(0)
    x, branch, one, two = rng.standard_normal((4, 4, 8, width))
    scale = rng.standard_normal(width)
    return (x, None if alone else branch, scale), (one, two)


def pulled(function, inputs, cotangents):
    """Returns the results of `function` and the gradients of its inputs."""
    results, pull = jax.vjp(function, *inputs)
    return [a for a in (*results, *pull(cotangents)) if a is not None]


def as_dtype(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("width", [64, 48])  # 48: a row that fills no block
def test_norm_of_a_sum(width, alone):
    inputs, cotangents = drawn(width, alone=alone)
    with jax.enable_x64(True):
        wanted = pulled(plain, as_dtype(inputs, "float64"), cotangents)
    found = pulled(
        lambda *given: add_norm(*given, EPS, True),
        as_dtype(inputs, "float32"),
        as_dtype(cotangents, "float32"),
    )
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_norm_of_a_stream_in_16_bits_is_of_what_is_stored():
    inputs, _ = drawn(64, alone=False)
    x, branch, scale = as_dtype(inputs, "bfloat16")
    total, normed = add_norm(x, branch, scale.astype("float32"), EPS, True)
    assert total.dtype == normed.dtype == jnp.bfloat16
    np.testing.assert_array_equal(total, x + branch)
    with jax.enable_x64(True):
        _, wanted = plain(*as_dtype((total, None, scale), "float64"))
    np.testing.assert_allclose(normed.astype("float32"), wanted, rtol=2**-8)


def test_norm_on_a_mesh_is_that_of_one_device():
    inputs, cotangents = drawn(64, alone=False)
    inputs, cotangents = as_dtype(inputs, "float32"), as_dtype(cotangents, "float32")

    def both(*given):
        return pulled(lambda *g: add_norm(*g, EPS, True), given, cotangents)

    one = both(*inputs)
    grid = mesh.build(MeshConfig(data=2, fsdp=2, context=2))
    with jax.set_mesh(grid):
        many = jax.jit(both)(*inputs)
    for ours, theirs in zip(many, one, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
