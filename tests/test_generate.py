"""Decoding with a cache, and sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small
from flax import nnx

from scaletrain.config import MeshConfig
from scaletrain.generate import Sampling, generate, sample

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def taken():
    """A model that has learned enough for its greedy choices to be clear-cut."""
    run = small.changed(small.RUN, num_steps=30)
    made = small.Taken(run)
    for seed in range(30):
        made.step(small.random_batch(run, seed % 2))
    return made


def full_forward(taken, prompt, count, end_id):
    """Returns greedy tokens, running the whole sequence again for each."""
    model = nnx.merge(taken.program.eval_graphdef, taken.state.params)
    forward = jax.jit(lambda *inputs: model(*inputs))
    tokens = list(prompt)
    for _ in range(count):
        # Slots after the last token are of no document, and of no effect.
        ids, segments = np.zeros((2, 1, 32), np.int32)
        ids[0, : len(tokens)], segments[0, : len(tokens)] = tokens, 1
        positions = np.arange(32, dtype=np.int32)[None]
        logits = forward(*map(jnp.asarray, (ids, positions, segments)))
        tokens.append(int(logits[0, len(tokens) - 1].argmax()))
        if tokens[-1] == end_id:
            return tokens[len(prompt) : -1]
    return tokens[len(prompt) :]


PROMPTS = [[5, 9, 2], [7], list(range(20)), []]


def test_greedy_equals_the_full_forward(taken):
    """Prompts of unequal lengths in one batch, each as if alone."""
    out = generate(
        taken.program, taken.state.params, PROMPTS, sampling=GREEDY, ends=[63], seed=0
    )
    wanted = [full_forward(taken, p or [63], 12, 63) for p in PROMPTS]
    assert out == wanted


def test_stops_at_end_of_text(taken):
    free = generate(
        taken.program,
        taken.state.params,
        [[5, 9, 2]],
        sampling=GREEDY,
        ends=[63],
        seed=0,
    )[0]
    end_id = free[4]
    out = generate(
        taken.program,
        taken.state.params,
        [[5, 9, 2]],
        sampling=GREEDY,
        ends=[62, end_id],
        seed=0,
    )[0]
    assert out == free[: free.index(end_id)]


def test_does_not_depend_on_the_mesh(taken):
    run = small.changed(taken.run, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    spread = small.Taken(run)
    layout = jax.tree.map(lambda leaf: leaf.sharding, spread.state.params)
    params = jax.device_put(jax.device_get(taken.state.params), layout)
    with jax.set_mesh(spread.mesh):
        out = generate(
            spread.program, params, PROMPTS, sampling=GREEDY, ends=[63], seed=0
        )
    assert out == [full_forward(taken, p or [63], 12, 63) for p in PROMPTS]


def test_the_seed_decides(taken):
    def draw(seed):
        return generate(
            taken.program, taken.state.params, [[1], [1]],
            sampling=Sampling(temperature=2.0), ends=[63], seed=seed,
        )  # fmt: skip

    assert draw(0) == draw(0) != draw(1)
    assert draw(0)[0] != draw(0)[1]


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=0.0), {3}),
        (Sampling(temperature=1.0, top_k=1), {3}),
        (Sampling(temperature=1.0, top_k=2), {3, 0}),
        (Sampling(temperature=1.0, top_p=0.5), {3}),
        (Sampling(temperature=1.0, top_p=0.8), {3, 0}),
        (Sampling(temperature=1.0), {0, 1, 2, 3}),
    ],
)
def test_only_allowed_tokens_are_drawn(sampling, allowed):
    shares = np.array([0.25, 0.1, 0.05, 0.6])
    logits = jnp.log(jnp.asarray(np.tile(shares, (2000, 1)), jnp.float32))
    out = np.asarray(sample(logits, jax.random.key(0), sampling))
    assert set(out) == allowed
    kept = shares[sorted(allowed)] / shares[sorted(allowed)].sum()
    counts = [(out == token).mean() for token in sorted(allowed)]
    np.testing.assert_allclose(counts, kept, atol=0.05)


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=1), {1}),
        (Sampling(temperature=1.0, top_k=2), {1, 2}),
        (Sampling(temperature=1.0, top_p=0.3), {1}),
        (Sampling(temperature=1.0, top_p=0.5), {1, 2}),
        (Sampling(temperature=1.0, top_k=3, top_p=0.5), {1, 2}),
    ],
)
def test_equally_likely_tokens_count_one_by_one(sampling, allowed):
    """As bfloat16 often makes them: k are k, and the first is the greedy one."""
    logits = jnp.log(jnp.asarray([[0.1, 0.3, 0.3, 0.3]] * 500, jnp.float32))
    out = np.asarray(sample(logits, jax.random.key(0), sampling))
    assert set(out) == allowed
    greedy = sample(logits, jax.random.key(0), Sampling(temperature=0.0))
    assert set(np.asarray(greedy)) == {1}


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Sampling(temperature=-1.0), "--temperature=-1.0; below 0"),
        (Sampling(temperature=float("nan")), "--temperature=nan; .* not finite"),
        (Sampling(top_k=-1), "--top_k=-1; below 0"),
        (Sampling(top_p=0.0), r"--top_p=0.0; outside \(0, 1\]"),
        (Sampling(max_new_tokens=0), "--max_new_tokens=0; below 1"),
        (
            Sampling(temperature=0.0, top_k=5),
            "--top_k=5; no effect with --temperature=0",
        ),
    ],
)
def test_sampling_that_makes_no_sense_is_told(sampling, words):
    import re

    assert re.search(words, "\n".join(sampling.problems()))
