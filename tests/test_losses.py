"""The loss against a float64 loop."""

import jax.numpy as jnp
import numpy as np

from scaletrain.losses import next_token_loss


def test_equals_a_float64_loop():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 5, 11)) * 4
    targets = rng.integers(0, 11, (3, 5))
    weights = rng.integers(0, 2, (3, 5)).astype(float)
    loss = z = 0.0
    for b, t in np.ndindex(3, 5):
        log_z = np.log(np.exp(logits[b, t]).sum())
        loss += weights[b, t] * (log_z - logits[b, t, targets[b, t]])
        z += weights[b, t] * log_z**2
    sums = next_token_loss(
        jnp.asarray(logits, jnp.float32),
        jnp.asarray(targets, jnp.int32),
        jnp.asarray(weights, jnp.float32),
    )
    np.testing.assert_allclose(sums, (loss, z, weights.sum()), rtol=1e-6)


def test_padding_does_not_count():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(1, 8, 11)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, 11, (1, 8)), jnp.int32)
    weights = jnp.asarray([[1.0] * 5 + [0.0] * 3])
    short = next_token_loss(logits[:, :5], targets[:, :5], weights[:, :5])
    garbage = logits.at[:, 5:].set(99.0)
    np.testing.assert_allclose(next_token_loss(garbage, targets, weights), short)
