"""One contract for every optimizer and every schedule."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from scaletrain import mesh, optim, step
from scaletrain.config import MeshConfig, OptimConfig, RunConfig
from scaletrain.config.schema import leaves
from scaletrain.optim import muon
from scaletrain.program import build

CHOICES = {
    path: field.metadata.get("choices") for path, field, _ in leaves(RunConfig())
}
OPTIMIZERS = CHOICES["optim.name"]
RATES = {"sgd": 1.0, "lion": 3e-3}
SHRINKS = 5e-3  # of a matrix, in a step: its rate x its decay


def with_optimizer(name, **settings):
    rate = RATES.get(name, 1e-2)
    return small.changed(
        small.RUN, optim__name=name, optim__learning_rate=rate, **settings
    )


def decaying(name, **settings):
    """Returns the run of most tests here: with biases, and all steps alike."""
    return with_optimizer(
        name,
        optim__weight_decay=SHRINKS / RATES.get(name, 1e-2),
        optim__schedule="constant",
        model__bias="all",
        **settings,
    )


@functools.cache
def compiled(name):
    return small.Taken(decaying(name))


@pytest.fixture
def taken(name):
    """The step of `decaying`, compiled once, where it begins."""
    found = compiled(name)
    found.state = found.initial()
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_learns_one_batch(taken):
    batch = small.random_batch(taken.run, 0)
    losses = [taken.step(batch)["loss"] for _ in range(40)]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_does_not_depend_on_mesh_or_accumulation(name, taken):
    cut = decaying(
        name,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        accumulate_steps=4,
        optim__accumulate="multi_steps",
    )
    losses = small.Taken(cut).losses(3)
    np.testing.assert_allclose(losses, taken.losses(3), rtol=1e-4)


def decayed(taken, embeddings):
    """Takes a step with no gradient: a matrix shrinks, and nothing else moves."""
    before = jax.device_get(taken.state.params)
    batch = small.random_batch(taken.run, 0)
    taken.step(batch | {"weights": np.zeros_like(batch["weights"])})
    after = jax.device_get(taken.state.params)
    for (path, one), two in zip(
        jax.tree.flatten_with_path(before)[0], jax.tree.leaves(after), strict=True
    ):
        leaf = path[-1].key
        at_the_ends = path[0].key in ("head", "embedding")
        decays = leaf in ("weight", "embedding") and (not at_the_ends or embeddings)
        np.testing.assert_allclose(two, one * (1 - SHRINKS if decays else 1), rtol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_reaches_matrices_alone(taken):
    decayed(taken, embeddings=False)


def test_decay_reaches_embeddings_if_asked_to():
    run = decaying("adamw", optim__decay_embeddings="yes")
    decayed(small.Taken(run), embeddings=True)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_keeps_the_parameters_precision(name):
    run = with_optimizer(name)
    state = build(run, mesh.abstract(run.mesh)).state
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(state.opt_state)}
    assert kinds <= {"float32", "int32"}


@pytest.mark.parametrize("name", ["adamw"])
def test_adamw_is_optax_adamw(taken):
    before, o = jax.device_get(taken.state.params), taken.run.optim
    plain = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            o.learning_rate, o.b1, o.b2, o.eps, weight_decay=o.weight_decay,
            mask=jax.tree.map_with_path(
                lambda p, _: p[-1].key == "weight" and p[0].key != "head", before
            ),
        ),
    )  # fmt: skip
    state, update = plain.init(before), jax.jit(plain.update)
    gradient = gradient_of(taken)
    for seed in range(3):
        batch = small.random_batch(taken.run, seed)
        grads = gradient(taken.state.params, batch)
        updates, state = update(grads, state, before)
        before = optax.apply_updates(before, updates)
        taken.step(batch)
    for one, two in zip(
        jax.tree.leaves(before), jax.tree.leaves(taken.state.params), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=1e-5)


def gradient_of(taken):
    """Returns the mean gradient, without the guard and the clipping of a step."""

    @jax.jit
    def gradient(params, batch):
        def mean(params):
            objective, sums = step._objective(
                params, {}, {}, batch, program=taken.program
            )
            return objective / sums.weight

        return jax.grad(mean)(params)

    def found(params, batch):
        with jax.set_mesh(taken.program.mesh):
            return jax.device_get(gradient(params, batch))

    return found


def spread(matrix):
    """Returns the largest singular value over the one four fifths down the list."""
    values = np.linalg.svd(matrix, compute_uv=False)
    return values.max() / np.quantile(values, 0.2)


@pytest.mark.parametrize("name", ["muon"])
def test_muon_orthogonalises_matrices_seen_as_inputs_by_outputs(taken):
    before, batch = jax.device_get(taken.state.params), small.random_batch(taken.run, 0)
    grads = gradient_of(taken)(before, batch)["blocks"]["attention"]
    before = before["blocks"]["attention"]
    taken.step(batch)
    after = jax.device_get(taken.state.params)["blocks"]["attention"]
    for name, inputs in (("q", 32), ("o", 32)):
        kept = (1 - SHRINKS) * before[name]["weight"]
        moved = (after[name]["weight"] - kept)[0]
        moved = moved.reshape(inputs, -1)
        raw = grads[name]["weight"][0].reshape(inputs, -1)
        assert spread(moved) < 2 < 5 < spread(raw)
        rms = 1e-2 * muon.RMS
        np.testing.assert_allclose(np.sqrt((moved**2).mean()), rms, rtol=0.2)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("constant", {4: 1, 50: 1, 99: 1}),
        ("cosine", {4: 1, 52: 0.55, 100: 0.1}),
        ("linear", {4: 1, 52: 0.55, 100: 0.1}),
        ("wsd", {4: 1, 79: 1, 80: 0.955, 89: 0.55, 99: 0.1}),
        ("inverse_sqrt", {4: 1, 16: 0.5, 64: 0.25}),
    ],
)
def test_schedules_hit_their_marks(name, wanted):
    assert set(CHOICES["optim.schedule"]) == {
        "constant", "cosine", "linear", "wsd", "inverse_sqrt",
    }  # fmt: skip
    o = OptimConfig(learning_rate=2.0, schedule=name, warmup_steps=4)
    rate = optim.schedule(RunConfig(num_steps=100, optim=o))
    np.testing.assert_allclose([rate(i) for i in range(4)], [0.5, 1, 1.5, 2])
    for at, share in wanted.items():
        np.testing.assert_allclose(rate(at), 2 * share, rtol=0.02)


@pytest.mark.parametrize(
    ("warmup", "decay", "wanted"),
    [
        (0, 1, [2, 2, 2, 0]),
        (0, 2, [2, 2, 1, 0]),
        (0, 4, [1.5, 1, 0.5, 0]),
        (2, 2, [1, 2, 1, 0]),
        (3, 1, [2 / 3, 4 / 3, 2, 0]),
    ],
)
def test_wsd_ends_at_the_final_rate_in_the_last_of_its_decay_steps(
    warmup, decay, wanted
):
    o = OptimConfig(
        learning_rate=2.0, schedule="wsd", warmup_steps=warmup, decay_steps=decay,
        final_ratio=0.0,
    )  # fmt: skip
    rate = optim.schedule(RunConfig(num_steps=4, optim=o))
    np.testing.assert_allclose([rate(i) for i in range(4)], wanted, atol=1e-6)


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_cosine_and_linear_would_have_the_final_rate_after_the_last_step(name):
    o = OptimConfig(learning_rate=2.0, schedule=name, warmup_steps=2, final_ratio=0.25)
    rate = optim.schedule(RunConfig(num_steps=6, optim=o))
    share = {"cosine": (1 + np.cos(0.75 * np.pi)) / 2, "linear": 0.25}[name]
    wanted = [0.5 + 1.5 * share, 0.5]
    np.testing.assert_allclose([rate(5), rate(6)], wanted, rtol=1e-6)


def test_clipping_bounds_the_gradient():
    """SGD without momentum moves the parameters by rate x clip_norm at most."""
    run = with_optimizer(
        "sgd", optim__b1=0.0, optim__clip_norm=0.5, optim__weight_decay=0.0,
        optim__schedule="constant",
    )  # fmt: skip
    taken = small.Taken(run)
    before = jax.device_get(taken.state.params)
    numbers = taken.step(small.random_batch(run, 0))
    moved = jax.tree.map(lambda a, b: a - b, before, jax.device_get(taken.state.params))
    assert numbers["grad_norm"] > 0.5
    np.testing.assert_allclose(optax.tree.norm(moved), 0.5, rtol=1e-4)


def guarded_by(pairs, *, sigma, window, state=None):
    """Returns what a guard applied of updates with these (loss, gradient) pairs."""
    tx = optim.guarded(optax.identity(), sigma, window)
    params = {"w": jnp.zeros(())}
    state = tx.init(params) if state is None else state

    @jax.jit
    def step(state, pair):
        # Two tokens: what arrives are sums.
        updates, state = tx.update(
            {"w": 2 * pair[1]},
            state,
            params,
            loss=2 * pair[0],
            tokens=jnp.array(2.0),
            finite=jnp.array(True),
        )
        return state, (updates["w"], state.limits)

    state, (applied, limits) = jax.lax.scan(step, state, jnp.asarray(pairs))
    return np.asarray(applied), np.asarray(limits), state


def judged(pairs, sigma, window):
    """Returns which pairs numpy would apply, and their limits, in float64."""
    good, verdicts, limits = [], [], []
    for pair in pairs.astype(np.float64):
        limit = np.full(2, np.inf)
        if len(good) >= window:
            last = np.array(good[-window:])
            limit = last.mean(axis=0) + sigma * last.std(axis=0)
        verdicts.append(bool(np.all(np.isfinite(pair) & (pair <= limit))))
        limits.append(limit)
        if verdicts[-1]:
            good.append(pair)
    return np.array(verdicts), np.array(limits)


@pytest.mark.parametrize(("sigma", "window"), [(6.0, 128), (2.0, 16), (3.0, 1024)])
def test_spikes_are_what_numpy_says(sigma, window):
    """Over more updates than the ring holds, with spikes and what is not finite."""
    rng = np.random.default_rng(window)
    pairs = np.abs(rng.normal((3, 1), (0.3, 0.1), (1500, 2))).astype(np.float32)
    pairs[:, 0] += np.linspace(2, 0, 1500)  # a loss that falls, as losses do
    pairs[rng.random(1500) < 0.02, 0] *= 4
    pairs[rng.random(1500) < 0.02, 1] *= 40
    pairs[rng.random(1500) < 0.01, 1] = np.nan
    pairs[rng.random(1500) < 0.01, 0] = np.inf
    verdicts, wanted = judged(pairs, sigma, window)
    applied, limits, state = guarded_by(pairs, sigma=sigma, window=window)
    np.testing.assert_array_equal(applied, np.where(verdicts, pairs[:, 1], 0))
    np.testing.assert_allclose(limits, wanted, rtol=1e-5)
    assert int(state.skipped) == (~verdicts).sum() > 20
    assert int(state.applied) == verdicts.sum()
    finite = np.isfinite(pairs).all(axis=1)
    assert (finite & ~verdicts).sum() > 5


def test_nothing_is_a_spike_before_the_window_is_full():
    rise = np.stack([np.geomspace(1, 1e6, 17)] * 2, axis=1).astype(np.float32)
    applied, limits, state = guarded_by(rise, sigma=2.0, window=16)
    assert (applied != 0).tolist() == [True] * 16 + [False]
    assert np.isinf(limits[:16]).all()
    # Without a limit nothing finite is left out; what was seen is kept all the same,
    # so that a run that goes on with one has a full window.
    applied, limits, state = guarded_by(rise, sigma=0.0, window=16)
    assert applied.all()
    assert np.isinf(limits).all()
    *_, state = guarded_by(1e9 * rise[:1], sigma=2.0, window=16, state=state)
    assert int(state.skipped) == 1


def test_a_level_that_shifts_for_good_is_skipped_in_a_row():
    level = np.ones((40, 2), np.float32)
    level[::2] += 0.1
    level[30:] += 1
    *_, state = guarded_by(level, sigma=6.0, window=16)
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (10, 10)
