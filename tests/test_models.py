"""The decoder: causal, independent of how it is executed, right in its parts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from scaletrain.config import PrecisionConfig, RopeConfig
from scaletrain.models import Cache, Decoder
from scaletrain.models.embedding import look_up
from scaletrain.models.layers import Norm, dropout, rotary_rates, rotate
from scaletrain.models.product import project

FLOAT32 = PrecisionConfig(compute="float32")
# Settings beyond the default, each of which every property below must survive.
VARIANTS = [
    {},
    {"qk_norm": "head", "head": "tied", "mlp": "geglu"},
    {"bias": "all", "mlp": "gelu", "logit_soft_cap": 5.0},
    {"bias": "qkv", "mlp": "relu2", "sliding_window": 4, "num_kv_heads": 1},
    {
        "norm": "rms_plus_one",
        "norm_order": "both",
        "embed_scale": 4.0,
        "attention_scale": 0.2,
        "attention_soft_cap": 3.0,
        "rope": RopeConfig(local_base=100.0, scaling="linear", factor=8.0),
        "sliding_window": 4,
        "global_every": 2,
    },
    {"norm": "layer", "bias": "all", "positions": "learned", "max_positions": 16},
    {"norm_order": "post", "qk_norm": "all"},
]


@functools.cache
def decoder(seed=0, precision=FLOAT32, **settings):
    model = dataclasses.replace(small.MODEL, **settings)
    made = Decoder(model, precision, jax.random.key(seed))
    # Biases and scales away from their initial 0 and 1, or nothing would see them.
    graphdef, state = nnx.split(made)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    leaves = [
        x + 0.1 * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def inputs(seed=0, B=2, T=12):
    tokens = jax.random.randint(jax.random.key(seed), (B, T), 0, 64)
    positions = jnp.tile(jnp.arange(T), (B, 1))
    return tokens, positions, jnp.ones((B, T), int)


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_token_sees_a_later_one(settings):
    """The gradient of position t with respect to later inputs is exactly 0."""
    model = decoder(**settings)
    tokens, positions, segments = inputs(B=1)
    graphdef, params = nnx.split(model)

    def logit(embedded, t):
        params_with = nnx.merge(graphdef, params)
        x, _ = params_with._layers(embedded, positions, segments, None, None)
        return params_with._logits(x)[0, t].sum()

    embedded = model._embed(tokens, positions)
    gradient = jax.jit(jax.grad(logit))
    for t in (0, 5, 11):
        grad = gradient(embedded, t)[0]
        reach = np.abs(np.asarray(grad)).sum(axis=-1)
        assert np.all(reach[t + 1 :] == 0)
        assert np.all(reach[max(0, t - 3) : t + 1] > 0)


@pytest.mark.parametrize("settings", VARIANTS)
def test_documents_in_one_sequence_do_not_touch(settings):
    model = decoder(**settings)
    tokens, _, _ = inputs(B=1)
    segments = jnp.array([[1] * 5 + [2] * 7])
    positions = jnp.array([[*range(5), *range(7)]])
    packed = model(tokens, positions, segments)
    for part in (slice(0, 5), slice(5, 12)):
        alone = model(
            tokens[:, part], positions[:, part], jnp.ones_like(segments[:, part])
        )
        np.testing.assert_allclose(packed[:, part], alone, atol=2e-5)


def value_and_grad(settings, execution):
    """Returns the loss and its gradient of a model that is executed as asked."""
    params = nnx.state(decoder(**settings))
    model = dataclasses.replace(small.MODEL, **settings, **execution)
    graphdef = nnx.graphdef(
        nnx.eval_shape(lambda: Decoder(model, FLOAT32, jax.random.key(0)))
    )

    def loss(params):
        logits = nnx.merge(graphdef, params)(*inputs())
        return jnp.mean(jnp.square(logits))

    return jax.jit(jax.value_and_grad(loss))(params)


@functools.cache
def by_default(variant):
    return value_and_grad(VARIANTS[variant], {})


@pytest.mark.parametrize("variant", [1, 4])
@pytest.mark.parametrize(
    "execution",
    [
        {"layers": "unroll"},
        {"remat": "full"},
        {"remat": "dots"},
        {"remat": "save", "remat_save": ("attention", "mlp_up")},
        {"layers": "unroll", "remat": "full"},
    ],
)
def test_execution_does_not_change_the_numbers(variant, execution):
    """Scanned, unrolled and rematerialised layers: one model, one set of parameters."""
    loss, grads = by_default(variant)
    other, other_grads = value_and_grad(VARIANTS[variant], execution)
    np.testing.assert_allclose(loss, other, rtol=1e-6)
    for one, two in zip(
        jax.tree.leaves(grads), jax.tree.leaves(other_grads), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-6 * float(jnp.abs(one).max() + 1))


@pytest.mark.parametrize("names", [("attention",), ("query", "mlp_gate")])
def test_remat_keeps_what_it_is_told_to(names, capsys):
    """Saved values show among the residuals of the backward pass, others do not."""

    def residuals(**how):
        model = decoder(layers="unroll", num_layers=1, **how)
        graphdef, params = nnx.split(model)

        def loss(params):
            return nnx.merge(graphdef, params)(*inputs()).sum()

        with jax.disable_jit():  # it does not see into functions
            jax.ad_checkpoint.print_saved_residuals(loss, params)
        return capsys.readouterr().out.splitlines()

    kept = residuals(remat="save", remat_save=names)
    assert {n for n in names if any(f"named '{n}'" in line for line in kept)} == set(
        names
    )
    assert len(kept) < len(residuals())
    assert len(residuals(remat="full")) < len(kept)


def test_bfloat16_stays_bfloat16():
    """No hidden float32 matmul, and logits in the reduce precision."""
    model = decoder(precision=PrecisionConfig())
    text = str(jax.make_jaxpr(lambda *a: model(*a))(*inputs()))
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert not [d for d in dots if "f32[" in d.split(" = ")[0] and "bkgts" not in d][1:]
    assert model(*inputs()).dtype == jnp.float32


def test_weight_gradients_leave_their_matmul_in_their_own_precision():
    x = jnp.ones((2, 3, 4), jnp.bfloat16)
    w = jnp.ones((4, 5))
    for gradients, wanted in (
        ("float32", "f32[4,5] = dot_general"),
        ("bfloat16", "bf16[4,5] = dot_general"),
    ):
        p = PrecisionConfig(gradients=gradients)

        def total(w, p=p):
            y = project("btd,df->btf", x, w, p)
            return y.sum().astype("float32")

        assert wanted in str(jax.make_jaxpr(jax.grad(total))(w))


@pytest.mark.parametrize(
    ("letters", "x_shape", "w_shape"),
    [
        ("btd,dnh->btnh", (2, 3, 4), (4, 2, 5)),
        ("btnh,nhd->btd", (2, 3, 2, 5), (2, 5, 4)),
        ("btd,vd->btv", (2, 3, 4), (7, 4)),
    ],
)
def test_project_has_the_gradient_of_einsum(letters, x_shape, w_shape):
    x = jax.random.normal(jax.random.key(0), x_shape)
    w = jax.random.normal(jax.random.key(1), w_shape)
    ours = jax.grad(lambda x, w: jnp.sin(project(letters, x, w, FLOAT32)).sum(), (0, 1))
    plain = jax.grad(lambda x, w: jnp.sin(jnp.einsum(letters, x, w)).sum(), (0, 1))
    for one, two in zip(ours(x, w), plain(x, w), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)


def test_embedding_gradient_adds_repeated_rows_in_float32():
    """1024 times the same token: bfloat16 would stop counting at 256."""
    table = jnp.ones((4, 2))
    tokens = jnp.full((1, 1024), 3)
    grad = jax.grad(
        lambda t: look_up(t, tokens, "vocab", PrecisionConfig()).astype("float32").sum()
    )(table)
    np.testing.assert_array_equal(grad[3], 1024)
    np.testing.assert_array_equal(grad[:3], 0)


def test_norm_equals_its_definition():
    x = np.random.default_rng(0).normal(size=(2, 3, 8)) * 10
    norm = Norm((8,), small.MODEL, FLOAT32)
    norm.scale[...] = jnp.arange(8.0)
    wanted = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.arange(8)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), wanted, rtol=1e-5)


def test_rotation_depends_on_distance_alone():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 8)) for i in (0, 1))

    rates = rotary_rates(RopeConfig(), 8)

    def score(i, j):
        one = rotate(q, jnp.array([[i]]), rates)
        two = rotate(k, jnp.array([[j]]), rates)
        return float((one * two).sum())

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-2)
    np.testing.assert_allclose(rotate(q, jnp.array([[0]]), rates), q)


def test_dropout_drops_its_share_and_keeps_the_mean():
    keys = jax.random.split(jax.random.key(0), 4)
    out = np.asarray(dropout(jnp.ones((4, 50, 50)), keys, 0.25))
    assert set(np.unique(out)) == {0.0, np.float32(1 / 0.75)}
    assert (out == 0).mean() == pytest.approx(0.25, abs=0.01)
    assert not np.array_equal(out[0], out[1])


def test_dropout_differs_between_layers_and_branches():
    model = decoder(dropout=0.5)
    keys = jax.random.split(jax.random.key(0), 2)
    plain, one = model(*inputs()), model(*inputs(), keys)
    assert not np.allclose(plain, one)
    np.testing.assert_array_equal(one, model(*inputs(), keys))


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_decoding_equals_the_full_forward(settings, layers):
    graphdef, params = nnx.split(decoder(layers=layers, **settings))
    tokens, positions, segments = inputs()
    full = jax.jit(lambda *given: nnx.merge(graphdef, params)(*given))(
        tokens, positions, segments
    )
    decode = jax.jit(lambda *given: nnx.merge(graphdef, params).decode(*given))
    cache = Cache.empty(decoder(layers=layers, **settings).model, 2, 14, "float32")
    logits, cache = decode(tokens[:, :5], positions[:, :5], segments[:, :5], cache)
    np.testing.assert_allclose(logits, full[:, 4], atol=2e-5)
    for t in range(5, 12):
        one = slice(t, t + 1)
        logits, cache = decode(
            tokens[:, one], positions[:, one], segments[:, one], cache
        )
        np.testing.assert_allclose(logits, full[:, t], atol=2e-5)
