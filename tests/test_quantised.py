"""8-bit matmuls: exact in their rounding, close in their gradients, one however cut."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import small

from scaletrain import checkpoint, compilation, mesh, step
from scaletrain.config import MeshConfig, PrecisionConfig
from scaletrain.errors import ConfigError
from scaletrain.hardware import chips
from scaletrain.matrices import LAYER
from scaletrain.models import quantised
from scaletrain.program import build, initial_state
from scaletrain.workdir import Workdir

DELAYED = small.changed(
    small.RUN, precision__matmul="fp8", precision__scaling="delayed"
)


@pytest.mark.parametrize("kind", [quantised.FORWARD, quantised.BACKWARD])
@pytest.mark.parametrize("top", [1e-3, 1.0, 447.9, 448.0, 448.1, 6e4])
def test_rounding_is_that_of_the_format(kind, top):
    """Against numpy: the least power of two that fits, then the nearest number."""
    x = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    x *= np.float32(top) / np.abs(x).max()
    scale = float(quantised.scale_of(quantised.amax(jnp.asarray(x)), kind))
    most = float(ml_dtypes.finfo(kind).max)
    assert np.log2(scale) % 1 == 0
    assert np.abs(x).max() <= scale * most < 2 * np.abs(x).max()
    found = quantised.rounded(jnp.asarray(x), kind, jnp.float32(scale))
    wanted = (x / np.float32(scale)).astype(kind)
    np.testing.assert_array_equal(np.asarray(found), wanted)


def test_what_is_too_large_becomes_the_largest_and_raises_the_next_scale():
    x = jnp.array([-1e4, 3.0, 448.0])
    values = quantised.rounded(x, quantised.FORWARD, jnp.float32(1))
    np.testing.assert_array_equal(np.asarray(values, np.float32), [-448, 3, 448])
    assert quantised.amax_of_rounded(values) > 2 * 448
    assert quantised.amax_of_rounded(values[1:2]) == 3
    hurt = quantised.rounded(x.at[1].set(jnp.inf), quantised.FORWARD, jnp.float32(1))
    assert not np.isfinite(quantised.amax_of_rounded(hurt))


@functools.cache
def gradients(**settings):
    """Returns the gradient of a batch, of a model in bfloat16."""
    run = small.changed(
        small.RUN, precision__compute="bfloat16", seq_len=128, **settings
    )
    program = build(run, mesh.build(run.mesh, jax.devices()[:1]))
    state = jax.jit(functools.partial(initial_state, run, program.tx))()
    expected = jax.tree.map(lambda history: history[0], state.amax)
    objective = functools.partial(step._objective, program=program)
    batch = jax.tree.map(jnp.asarray, small.text_batch(run))
    return jax.jit(jax.grad(objective, has_aux=True))(
        state.params, expected, {}, batch
    )[0]


def flat(tree):
    return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
    "settings",
    [
        {"precision__matmul": "fp8"},
        {"precision__matmul": "fp8", "precision__scaling": "delayed"},
        {"precision__matmul": "int8"},
    ],
    ids=["current", "delayed", "int8"],
)
def test_gradients_point_where_those_of_bfloat16_do(settings):
    one, two = flat(gradients()), flat(gradients(**settings))
    assert one @ two / np.linalg.norm(one) / np.linalg.norm(two) > 0.99
    assert not np.array_equal(one, two)


@pytest.fixture(scope="module")
def alone():
    """Returns a run on one device and its losses, three steps on."""
    taken = small.Taken(DELAYED)
    return taken, taken.losses(3)


@pytest.mark.parametrize(
    "cut",
    [
        {"model__layers": "unroll", "accumulate_steps": 4},
        {
            "mesh": MeshConfig(data=2, fsdp=4),
            "accumulate_steps": 2,
            "optim__accumulate": "multi_steps",
        },
    ],
    ids=["unroll microbatch", "mesh multi_steps"],
)
def test_one_history_however_a_step_is_executed(alone, cut):
    """The largest magnitudes of a whole step, on every device and in every part."""
    taken = small.Taken(small.changed(DELAYED, **cut))
    np.testing.assert_allclose(taken.losses(3), alone[1], rtol=3e-4)
    found, wanted = jax.device_get((taken.state.amax, alone[0].state.amax))
    assert all((leaf[:3] > 0).all() for leaf in jax.tree.leaves(found))
    assert all((leaf[3:] == 0).all() for leaf in jax.tree.leaves(found))
    # A sum in another order may round to the 8-bit number next to it; the entries of
    # later steps also have the differences of the weights in them.
    first, expected = (jax.tree.map(lambda h: h[2], each) for each in (found, wanted))
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0.3), first, expected
    )


def test_history_is_saved_and_restored_to_the_bit(alone, tmp_path):
    taken, _ = alone
    checkpoints = checkpoint.Store(Workdir(tmp_path), DELAYED)
    with contextlib.closing(checkpoints):
        checkpoints.save(3, taken.state, "data", [])
        checkpoints.finish()
        found = checkpoints.restore(3, taken.program.state)
    one, two = jax.device_get((found, taken.state))
    assert len(jax.tree.leaves(one.amax)) == len(LAYER)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_what_is_not_finite_never_reaches_the_history(alone):
    """Last of those that share a run: it takes steps."""
    taken, _ = alone
    before = jax.device_get((taken.state.params, taken.state.amax))
    batch = small.random_batch(DELAYED, 3)
    batch["weights"][5, 3] = np.inf
    assert taken.step(batch)["skipped"] == 1
    params, amax = jax.device_get((taken.state.params, taken.state.amax))
    jax.tree.map(np.testing.assert_array_equal, before[0], params)
    for old, new in zip(*map(jax.tree.leaves, (before[1], amax)), strict=True):
        np.testing.assert_array_equal(new, np.roll(old, 1, axis=0) * (new != 0))
        assert np.isfinite(new).all()
    assert np.isfinite(taken.step(small.random_batch(DELAYED, 4))["loss"])


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, tuple(LAYER)),
        ({"precision__targets": ("mlp/*",)}, tuple(LAYER)[4:]),
        ({"precision__targets": ("attention/[qk]",)}, tuple(LAYER)[:2]),
        ({"lora__rank": 2, "init_from": "base"}, tuple(LAYER)),
        ({"precision__scaling": "current"}, ()),
        ({"precision__matmul": "compute", "precision__scaling": "current"}, ()),
    ],
)
def test_what_is_named_has_a_history(settings, names):
    """All but the head and the embeddings unless told otherwise; adapters have none."""
    run = small.changed(DELAYED, **settings)
    program = build(run, mesh.build(run.mesh, jax.devices()[:1]))
    wanted = {f"blocks/{name}/amax" for name in names}
    assert set(checkpoint.flat(program.state.amax)) == wanted
    with jax.set_mesh(program.mesh):
        traced = str(
            compilation.jitted(program).trace(program.state, program.batch).jaxpr
        )
    low = run.precision.matmul == "fp8"
    assert ("f8_e4m3fn" in traced, "f8_e5m2" in traced) == (low, low)


def test_units_that_a_device_lacks_are_refused(monkeypatch):
    monkeypatch.setattr(chips, "low_precision", lambda kind: {"int8": 2})
    with pytest.raises(
        ConfigError, match="precision.matmul=fp8; cpu is not.*use compute or int8"
    ):
        build(DELAYED, mesh.build(DELAYED.mesh, jax.devices()[:1]))
    plain = small.changed(DELAYED, precision=PrecisionConfig())
    build(plain, mesh.build(plain.mesh, jax.devices()[:1]))
