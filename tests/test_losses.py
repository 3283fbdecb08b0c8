"""The head's loss and its gradients against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaletrain import losses, mesh, sharding
from scaletrain.config import MeshConfig, PrecisionConfig
from scaletrain.kernels import cross_entropy
from scaletrain.losses import Head, head_loss

B, T, D, V = 8, 6, 16, 24
FLOAT32 = PrecisionConfig(compute="float32")


def inputs(vocab_first):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(B, T, D)).astype(np.float32)
    w = rng.normal(size=(V, D) if vocab_first else (D, V)).astype(np.float32)
    targets = rng.integers(0, V, (B, T)).astype(np.int32)
    return x, w, targets, rng.integers(0, 3, (B, T)).astype(np.float32)


def by_hand(head, x, w, targets, weights):
    """Objective, sums and gradients in float64, through all logits at once."""
    x, w, weights = (np.asarray(a, np.float64) for a in (x, w, weights))
    matrix = w.T if head.vocab_first else w
    logits, slope = x @ matrix, 1.0
    if head.soft_cap:
        tanh = np.tanh(logits / head.soft_cap)
        logits, slope = head.soft_cap * tanh, 1 - tanh**2
    log_z = np.log(np.exp(logits).sum(-1))
    hit = np.eye(V)[targets]
    loss = ((log_z - (logits * hit).sum(-1)) * weights).sum()
    z = (log_z**2 * weights).sum()
    shares = np.exp(logits - log_z[..., None])
    pull = (1 + 2 * head.z_loss * log_z)[..., None]
    d = (shares * pull - hit) * weights[..., None] * slope
    dw = np.einsum("btd,btv->dv", x, d)
    dw = dw.T if head.vocab_first else dw
    return loss + head.z_loss * z, (loss, z, weights.sum()), (d @ matrix.T, dw)


HEADS = {
    "plain": Head(FLOAT32),
    "all": Head(FLOAT32, vocab_first=True, soft_cap=5.0, z_loss=0.1),
}
MESHES = {
    "none": None,
    "one": MeshConfig(),
    "fsdp": MeshConfig(fsdp=8),
    "three": MeshConfig(data=2, fsdp=2, tensor=2),
    "context": MeshConfig(fsdp=2, context=2, tensor=2),
}


@pytest.fixture
def kernel(monkeypatch):
    """Lets the GPU's kernel run here, in two blocks a row, and tells how often."""
    used = []

    def interpreted(*args, **settings):
        used.append(args)
        return cross_entropy.cross_entropy(*args, **settings, interpret=True)

    monkeypatch.setattr(cross_entropy, "_BLOCK", 16)
    monkeypatch.setattr(losses, "cross_entropy", interpreted)
    monkeypatch.setattr(losses.sharding, "platform", lambda: "gpu")
    return used


@pytest.mark.parametrize("name", ["none", "fsdp"])
@pytest.mark.parametrize("kind", HEADS)
def test_logits_become_their_gradients_in_place(kind, name, kernel, monkeypatch):
    test_loss_and_gradients_equal_float64(kind, name, 2, monkeypatch)
    assert kernel


def test_a_cut_vocabulary_has_no_kernel(kernel, monkeypatch):
    test_loss_and_gradients_equal_float64("plain", "three", 2, monkeypatch)
    assert not kernel


def test_a_row_may_begin_with_what_cannot_be():
    logits = jnp.zeros((1, V)).at[:, :20].set(-jnp.inf)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "_BLOCK", 16)
        log_z, _, grad = cross_entropy.cross_entropy(
            logits, jnp.array([20]), jnp.ones(1), soft_cap=0.0, z_loss=0.0,
            interpret=True,
        )  # fmt: skip
    np.testing.assert_allclose(log_z, np.log(V - 20), rtol=1e-6)
    np.testing.assert_allclose(grad[0, 20:], [-0.75, 0.25, 0.25, 0.25], rtol=1e-6)


def test_gradients_of_16_bits_are_rounded_once():
    """And an infinity, which the loss has to show, is not lost on the way."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(4 * rng.normal(size=(B, V)), jnp.bfloat16)
    targets, ones = jnp.asarray(rng.integers(0, V, B), jnp.int32), jnp.ones(B)
    score = functools.partial(
        cross_entropy.cross_entropy, soft_cap=0.0, z_loss=0.0, interpret=True
    )
    log_z, picked, grad = score(logits, targets, ones)
    wide = np.asarray(logits, np.float64)
    exp = np.exp(wide)
    np.testing.assert_allclose(log_z, np.log(exp.sum(-1)), rtol=1e-6)
    np.testing.assert_array_equal(
        picked, np.take_along_axis(wide, targets[:, None], 1)[:, 0]
    )
    wanted = exp / exp.sum(-1, keepdims=True) - np.eye(V)[targets]
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(grad, np.float64), wanted, rtol=2**-8)
    log_z, *_ = score(logits.at[2, 3].set(jnp.inf), targets, ones)
    assert not np.isfinite(log_z[2])


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("chunk", [1000, 2])
def test_loss_and_gradients_equal_float64(kind, name, chunk, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", chunk * V)
    head = HEADS[kind]
    x, w, targets, weights = inputs(head.vocab_first)
    objective, sums, gradients = by_hand(head, x, w, targets, weights)

    def loss(x, w):
        return head_loss(head, x, w, jnp.asarray(targets), jnp.asarray(weights))

    def run(x, w):
        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(x, w)

    if MESHES[name] is None:
        found = run(jnp.asarray(x), jnp.asarray(w))
    else:
        size = 1 if name == "one" else 8
        grid = mesh.build(MESHES[name], jax.devices()[:size])
        with jax.set_mesh(grid):
            x = jax.device_put(x, sharding.spec("batch", "tokens", "residual"))
            w = jax.device_put(w, sharding.spec(*head.axes))
            found = run(x, w)
            assert found[1][1].sharding.is_equivalent_to(w.sharding, 2)
            alone, _ = jax.jit(loss)(x, w)  # nobody asks for a gradient
            np.testing.assert_allclose(alone, objective, rtol=1e-5)
    np.testing.assert_allclose(found[0][0], objective, rtol=1e-5)
    np.testing.assert_allclose(found[0][1], sums, rtol=1e-5)
    for mine, wanted in zip(found[1], gradients, strict=True):
        np.testing.assert_allclose(mine, wanted, rtol=1e-4, atol=1e-5)


def test_padding_does_not_count():
    x, w, targets, weights = map(jnp.asarray, inputs(False))
    weights = weights.at[:, 4:].set(0)
    short = head_loss(Head(FLOAT32), x[:, :4], w, targets[:, :4], weights[:, :4])
    x = x.at[:, 4:].set(99.0)
    found = head_loss(Head(FLOAT32), x, w, targets, weights)
    np.testing.assert_allclose(found[1], short[1], rtol=1e-6)


def test_the_whole_logits_never_exist(monkeypatch):
    monkeypatch.setattr(losses, "LOGITS", 8 * V)
    x, w, targets, weights = map(jnp.asarray, inputs(False))

    def loss(x, w):
        return head_loss(Head(FLOAT32), x, w, targets, weights)[0]

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(x, w))
    assert f"[8,{V}]" in text
    assert f"{B * T},{V}]" not in text
    assert f"{B},{T},{V}]" not in text


def test_a_frozen_head_has_no_gradient():
    x, w, targets, weights = map(jnp.asarray, inputs(False))
    head = Head(FLOAT32, trained=False)

    def loss(x, w):
        return head_loss(head, x, w, targets, weights)[0]

    dx, dw = jax.grad(loss, (0, 1))(x, w)
    assert not dw.any()
    wanted = by_hand(head, x, w, targets, weights)[2][0]
    np.testing.assert_allclose(dx, wanted, rtol=1e-4, atol=1e-5)


def test_scaled_objectives_have_scaled_gradients():
    x, w, targets, weights = map(jnp.asarray, inputs(False))

    def loss(x, scale):
        return scale * head_loss(Head(FLOAT32), x, w, targets, weights)[0]

    one, two = (jax.grad(loss)(x, scale) for scale in (1.0, 2.0))
    np.testing.assert_allclose(2 * one, two, rtol=1e-6)
