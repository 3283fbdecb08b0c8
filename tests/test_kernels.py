"""Hand-written kernels, interpreted, against float64."""

import contextlib
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx
from jax.experimental.pallas import mosaic_gpu

from scaletrain import mesh, sharding
from scaletrain.config import LoraConfig, MeshConfig, PrecisionConfig
from scaletrain.kernels import glu, rotary
from scaletrain.kernels.matmul import takes
from scaletrain.kernels.norm import add_norm
from scaletrain.kernels.rotary import Heads, split_rotated
from scaletrain.models import Decoder, layers, mlp

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


def rotated(heads_BTF, angle_BTP, heads):
    """Returns what the kernel promises, in the precision of its inputs."""
    N, K, H = heads
    every_BTnH = heads_BTF.reshape(*heads_BTF.shape[:2], -1, H)
    q, k, v = jnp.split(every_BTnH, (N, N + K), axis=2)
    sin, cos = jnp.sin(angle_BTP)[:, :, None], jnp.cos(angle_BTP)[:, :, None]

    def turned(x):
        one, two = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([one * cos - two * sin, two * cos + one * sin], axis=-1)

    return turned(q), turned(k), v


@pytest.mark.parametrize("grid", [None, MeshConfig(data=2, fsdp=2, context=2)])
@pytest.mark.parametrize(
    "heads", [Heads(4, 2, 8), Heads(3, 3, 12)]
)  # 12: pairs that fill no block; blocks that the last heads do not fill
def test_heads_are_split_and_turned(heads, grid, monkeypatch):
    """Values and gradients, of one device and of several."""
    monkeypatch.setattr(rotary, "_PAIRS", 128)
    N, K, H = heads
    rng = np.random.default_rng(0)
    B, T = 4, 10
    wide = rng.standard_normal((B, T, (N + 2 * K) * H))
    angles = rng.uniform(0, 9, (B, T, H // 2))
    cotangents = tuple(rng.standard_normal((B, T, n, H)) for n in (N, K, K))
    with jax.enable_x64(True):
        wanted = pulled(
            lambda x: rotated(x, jnp.asarray(angles), heads),
            (as_dtype(wide, "float64"),),
            as_dtype(cotangents, "float64"),
        )

    def found(wide, angles, cotangents):
        sin, cos = jnp.sin(angles), jnp.cos(angles)
        return pulled(
            lambda x: split_rotated(x, sin, cos, heads, True), (wide,), cotangents
        )

    given = as_dtype((wide, angles, cotangents), "float32")
    with jax.set_mesh(mesh.build(grid)) if grid else contextlib.nullcontext():
        ours = jax.jit(found)(*given)
    for one, two in zip(ours, wanted, strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "called"),
    [
        ({}, True),
        ({"mesh": MeshConfig(data=2, fsdp=2, context=2)}, True),
        ({"mesh": MeshConfig(tensor=2)}, False),
        ({"mesh": MeshConfig(fsdp=2), "shape": (1, 8)}, False),
        ({"model": {"bias": "qkv"}}, False),
        ({"model": {"qk_norm": "head"}}, False),
        ({"model": {"positions": "learned"}}, False),
        ({"lora": LoraConfig(rank=2)}, False),
        ({"precision": PrecisionConfig(matmul="fp8")}, False),
        ({"platform": "tpu"}, False),
    ],
)
def test_where_heads_are_turned_by_the_kernel(settings, called, monkeypatch):
    """What comes between the matmul and the positions is not left out."""
    given = []

    def split(heads_BTF, sin_BTP, cos_BTP, heads):
        given.append(heads)
        return rotated(heads_BTF, sin_BTP, heads)

    monkeypatch.setattr(rotary, "split_rotated", split)
    platform = settings.get("platform", "gpu")
    monkeypatch.setattr(sharding, "platform", lambda: platform)
    model = dataclasses.replace(small.MODEL, **settings.get("model", {}))
    grid = settings.get("mesh", MeshConfig())
    devices = jax.devices()[: math.prod(dataclasses.astuple(grid)[:6])]
    shape = settings.get("shape", (4, 8))
    x = jax.ShapeDtypeStruct((*shape, model.d_model), jnp.float32)
    ids = jax.ShapeDtypeStruct(shape, jnp.int32)

    def run(x_BTD, ids_BT):
        lora = settings.get("lora", LoraConfig())
        precision = settings.get("precision", PrecisionConfig())
        branch = layers.Attention(model, precision, lora, jax.random.key(0))
        return branch(x_BTD, ids_BT, ids_BT, True)

    with jax.set_mesh(mesh.build(grid, devices)):
        jax.eval_shape(run, x, ids)
    sizes = Heads(model.num_heads, model.num_kv_heads, model.d_head)
    assert given == [sizes] * called


GATES = {
    "swiglu": (glu.silu, jax.nn.silu),
    "geglu": (glu.gelu, lambda x: jax.nn.gelu(x, approximate=True)),
}
# Two tiles down and two across, two steps of the inner dim.
B, T, D, F = 2, 128, 128, 512
BOTH = {"remat": "save", "remat_save": ("mlp_gate", "mlp_up")}


def branch(seed=0):
    """Returns x, the gradient of the branch, and gate, up and down in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 5)
    shapes = (B, T, D), (B, T, D), (D, F), (D, F), (F, D)
    scales = 1, 1, 2 * D**-0.5, D**-0.5, F**-0.5
    return [
        (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16)
        for key, shape, scale in zip(keys, shapes, scales, strict=True)
    ]


def running():
    """Returns a context in which kernels run: interpreted where there is no GPU."""
    if jax.default_backend() == "gpu":
        return contextlib.nullcontext()
    params = mosaic_gpu.InterpretGPUParams(detect_races=True)
    return mosaic_gpu.force_gpu_interpret_mode(params)


def is_rounded(found, wanted):
    """Whether each is the bfloat16 nearest to what it should be, or next to it."""
    floor = 2**-8 * np.abs(wanted).max()  # where terms cancel
    np.testing.assert_allclose(
        np.asarray(found, "float64"), wanted, rtol=2**-7, atol=floor
    )


@pytest.mark.parametrize("name", GATES)
def test_gated_matmuls(name):
    """Forward and backward, each from what was stored, and the product made again."""
    gate, activation = GATES[name]
    x, dout, gate_DF, up_DF, down = branch()
    with running():
        streams = glu.forward(gate, x, glu.interleaved(gate_DF, up_DF))
        gate_BTF, up_BTF, product_BTF = streams
        given = (dout, gate_BTF, up_BTF), down
        both_BTG, again_BTF = glu.backward(gate, *given, True)
        (alone_BTG,) = glu.backward(gate, *given, False)
    np.testing.assert_array_equal(again_BTF, product_BTF)
    np.testing.assert_array_equal(alone_BTG, both_BTG)
    with jax.enable_x64(True):
        x, dout, gate_DF, up_DF, down, *stored = as_dtype(
            (x, dout, gate_DF, up_DF, down, gate_BTF, up_BTF), "float64"
        )
        wanted, pull = jax.vjp(lambda g, u: activation(g) * u, *stored)
        dgate_BTF, dup_BTF = pull(jnp.einsum("btd,fd->btf", dout, down))
        is_rounded(gate_BTF, jnp.einsum("btd,df->btf", x, gate_DF))
        is_rounded(up_BTF, jnp.einsum("btd,df->btf", x, up_DF))
        is_rounded(product_BTF, wanted)
        both_RG = both_BTG.reshape(B * T, 2 * F)
        for ours, theirs in zip(
            glu.deinterleaved(both_RG), (dgate_BTF, dup_BTF), strict=True
        ):
            is_rounded(ours, theirs.reshape(B * T, F))


def in_plain_words(epilogue, inputs, shapes, *, transposed=False):
    """Returns what `matmul` does for the branch, for several devices at once.

    Their kernels cannot be interpreted beside each other.
    """
    x_RD, w, *stored = inputs

    def product(gate_RF, up_RF):
        return jax.nn.silu(gate_RF) * up_RF

    if transposed:
        pull = jax.vjp(product, *stored)[1]
        found = (glu.interleaved(*pull(x_RD @ w.T)),)
    else:
        gate_RF, up_RF = glu.deinterleaved(x_RD @ w)
        found = gate_RF, up_RF, product(gate_RF, up_RF)
    assert [each.shape for each in found] == shapes
    return found


@pytest.mark.parametrize(
    ("grid", "remat"),
    [
        (MeshConfig(), {}),
        (MeshConfig(), BOTH),
        (MeshConfig(data=2, context=2, fsdp=2), {}),
    ],
)
def test_branch_within_matmuls_is_the_plain_one(grid, remat, monkeypatch):
    """Its value and all gradients, each as near to float32's as the plain one's."""
    model = dataclasses.replace(small.MODEL, d_model=64, d_ff=256, **remat)
    x_BTD = jax.random.normal(jax.random.key(1), (4, 256, 64))
    if grid != MeshConfig():
        monkeypatch.setattr(glu, "matmul", in_plain_words)

    def made(compute, *, fits):
        monkeypatch.setattr(glu, "takes", lambda *sizes: fits)
        precision = PrecisionConfig(compute=compute)
        branch = mlp.Mlp(model, precision, LoraConfig(), jax.random.key(0))
        graphdef, params = nnx.split(branch)

        def loss(params, x_BTD):
            out_BTD = nnx.merge(graphdef, params)(x_BTD)
            return jnp.sum(jnp.sin(out_BTD.astype(jnp.float32))), out_BTD

        grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
        devices = jax.devices()[: math.prod(dataclasses.astuple(grid)[:6])]
        with jax.set_mesh(mesh.build(grid, devices)), running():
            return jax.tree.leaves(grad(params, x_BTD.astype(compute)))

    exact = made("float32", fits=False)
    plain = made("bfloat16", fits=False)
    within = made("bfloat16", fits=True)

    def away(found):
        wide = [np.asarray(leaf, "float32") for leaf in found]
        pairs = zip(wide, exact, strict=True)
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs])

    assert (away(within) < 1.1 * away(plain)).all()
    assert not all(map(np.array_equal, within, plain))


@pytest.mark.parametrize(
    ("remat", "count"),
    [
        ({}, 2),
        (BOTH, 2),
        ({"remat": "save", "remat_save": ("mlp_gate",)}, 3),
        ({"remat": "full"}, 3),
        ({"remat": "dots"}, 0),
    ],
)
def test_matmuls_are_written_down_once_for_all_layers(remat, count, monkeypatch):
    """A GPU's compiler would else make each anew; a third is one that runs again."""
    monkeypatch.setattr(glu, "takes", lambda *sizes: True)
    model = dataclasses.replace(
        small.MODEL, d_model=64, d_ff=256, num_layers=3, layers="unroll", **remat
    )
    decoder = Decoder(model, PrecisionConfig(), jax.random.key(0))
    graphdef, params = nnx.split(decoder)
    ids_BT = jnp.ones((1, 128), jnp.int32)

    def loss(params):
        return jnp.sum(nnx.merge(graphdef, params)(ids_BT, ids_BT, ids_BT))

    traced = jax.jit(jax.grad(loss)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == count


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        ({}, [(1024, 32, 64, "bfloat16")]),
        ({"mesh": MeshConfig(data=2, fsdp=2, context=2)}, [(128, 32, 64, "bfloat16")]),
        ({"mesh": MeshConfig(tensor=2)}, []),
        ({"mesh": MeshConfig(context=2), "shape": (8, 1)}, []),
        ({"mesh": MeshConfig(fsdp=2), "shape": (1, 256)}, []),
        ({"model": {"bias": "all"}}, [(1024, 32, 64, "bfloat16")]),
        ({"lora": LoraConfig(rank=2)}, [(1024, 32, 64, "bfloat16")]),
        ({"model": {"mlp": "relu2"}}, []),
    ],
)
def test_where_the_branch_is_within_its_matmuls(settings, asked, monkeypatch):
    """Each device's sizes are asked for; what is more than a product is left alone."""
    told, fused = [], []
    monkeypatch.setattr(glu, "takes", lambda *sizes: not told.append(sizes))
    monkeypatch.setattr(mlp, "fused_mlp", lambda how, x, w: fused.append(how) or x)
    model = dataclasses.replace(small.MODEL, **settings.get("model", {}))
    lora = settings.get("lora", LoraConfig())
    grid = settings.get("mesh", MeshConfig())
    devices = jax.devices()[: math.prod(dataclasses.astuple(grid)[:6])]
    x = jax.ShapeDtypeStruct((*settings.get("shape", (4, 256)), 32), jnp.bfloat16)

    def run(x_BTD):
        branch = mlp.Mlp(model, PrecisionConfig(), lora, jax.random.key(0))
        return branch(x_BTD)

    with jax.set_mesh(mesh.build(grid, devices)):
        jax.eval_shape(run, x)
    assert told == asked
    assert bool(fused) == (bool(asked) and settings.keys() <= {"mesh"})


@pytest.mark.parametrize(
    ("kind", "rows", "inner", "columns", "dtype", "taken"),
    [
        ("NVIDIA H100 80GB HBM3", 128, 64, 256, "bfloat16", True),
        ("NVIDIA H200", 256, 128, 512, "bfloat16", True),
        ("NVIDIA B200", 128, 64, 256, "bfloat16", False),
        ("cpu", 128, 64, 256, "bfloat16", False),
        ("NVIDIA H200", 64, 64, 256, "bfloat16", False),
        ("NVIDIA H200", 128, 32, 256, "bfloat16", False),
        ("NVIDIA H200", 128, 8192, 256, "bfloat16", False),
        ("NVIDIA H200", 128, 64, 128, "bfloat16", False),
        ("NVIDIA H200", 128, 64, 256, "float32", False),
    ],
)
def test_what_the_matmul_takes(kind, rows, inner, columns, dtype, taken, monkeypatch):
    monkeypatch.setattr(sharding, "device_kind", lambda: kind)
    assert takes(rows, inner, columns, dtype) == taken
