"""Every attention implementation against a float64 loop over single tokens."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaletrain.models.attention import Scores, attend, splash


def reference(q, k, v, q_segments, kv_segments, q_start, window):
    """Returns attention one query at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    B, T, N, H = q.shape
    K = k.shape[2]
    out = np.zeros((B, T, N, H))
    for b, t, n in np.ndindex(B, T, N):
        slot = q_start + t
        first = max(0, slot - window + 1) if window else 0
        seen = [
            s for s in range(first, slot + 1) if kv_segments[b, s] == q_segments[b, t]
        ]
        scores = np.array([q[b, t, n] @ k[b, s, n * K // N] for s in seen]) / H**0.5
        shares = np.exp(scores - scores.max())
        out[b, t, n] = (shares / shares.sum()) @ v[b, seen, n * K // N]
    return out


@pytest.mark.parametrize("implementation", ["xla"])
@pytest.mark.parametrize(("N", "K"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("window", [0, 1, 5])
def test_equals_the_reference(implementation, N, K, window):
    B, T, S, H, start = 2, 9, 16, 8, 4
    rng = np.random.default_rng(N + window)
    q, k, v = (
        rng.normal(size=shape).astype(np.float32)
        for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))
    )
    kv_segments = np.sort(rng.integers(0, 3, (B, S)), axis=1).astype(np.int32)
    q_segments = kv_segments[:, start : start + T]
    out = attend(
        *map(jnp.asarray, (q, k, v)),
        q_segments_BT=jnp.asarray(q_segments),
        kv_segments_BS=jnp.asarray(kv_segments),
        q_start=start,
        scores=Scores(scale=H**-0.5, window=window),
        implementation=implementation,
    )
    wanted = reference(q, k, v, q_segments, kv_segments, start, window)
    np.testing.assert_allclose(out, wanted, atol=2e-6)


@pytest.mark.parametrize("implementation", ["xla"])
def test_packed_equals_unpacked(implementation):
    """Documents in one sequence get what each gets alone, gradients included."""
    N, K, H, lengths = 4, 2, 8, (5, 1, 10)
    keys = jax.random.split(jax.random.key(0), 3)
    T = sum(lengths)
    shapes = ((1, T, N, H), (1, T, K, H), (1, T, K, H))
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    segments = jnp.repeat(jnp.arange(3), jnp.array(lengths))[None]

    def run(q, k, v, segments):
        out = attend(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments,
            scores=Scores(scale=H**-0.5), implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out)), out

    grad = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
    (_, packed), packed_grads = grad(q, k, v, segments)
    edges = np.cumsum((0, *lengths))
    for start, stop in itertools.pairwise(edges):
        part = [x[:, start:stop] for x in (q, k, v)]
        (_, alone), grads = grad(*part, jnp.zeros((1, stop - start), int))
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=1e-6)
        for whole, own in zip(packed_grads, grads, strict=True):
            np.testing.assert_allclose(whole[:, start:stop], own, atol=1e-6)


def test_softmax_runs_in_the_reduce_precision():
    """In bfloat16 the shares of 512 equal scores would not sum to one."""
    q = jnp.zeros((1, 512, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 512, 1, 8), jnp.bfloat16)
    segments = jnp.zeros((1, 512), int)
    text = str(
        jax.make_jaxpr(
            lambda q, v: attend(
                q,
                q,
                v,
                q_segments_BT=segments,
                kv_segments_BS=segments,
                scores=Scores(scale=1.0),
            )
        )(q, v)
    )
    assert "f32[1,1,1,512,512] = exp" in text
    assert "bf16[1,1,1,512,512] = exp" not in text


on_gpu = pytest.mark.skipif(
    jax.config.jax_platforms != "cuda", reason="needs JAX_PLATFORMS=cuda"
)


@on_gpu
@pytest.mark.parametrize("documents", [1, 2, 8, 9, 40])
@pytest.mark.parametrize(
    ("how", "local", "K", "H"),
    [
        (Scores(scale=0.125), True, 4, 64),
        (Scores(scale=0.2), True, 1, 128),
        (Scores(scale=0.125, window=100), True, 2, 64),
        (Scores(scale=0.125, window=100), "traced", 2, 64),
    ],
)
def test_the_kernel_for_gpus_equals_the_plain_one(how, local, K, H, documents):
    """Rows of different numbers of documents, forward and gradients, in bfloat16."""
    B, T, N = 3, 512, 4
    rng = np.random.default_rng(documents)
    edges = [
        np.sort(rng.choice(T - 1, max(0, documents - 1 - b), replace=False)) + 1
        for b in range(B)
    ]
    segments = np.stack([np.searchsorted(e, np.arange(T), side="right") for e in edges])
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H))
    *qkv, weight = (
        jax.random.normal(key, s, jnp.bfloat16)
        for key, s in zip(keys, shapes, strict=True)
    )

    def run(q, k, v, local, implementation):
        def loss(q, k, v):
            out = attend(
                q, k, v, q_segments_BT=jnp.asarray(segments),
                kv_segments_BS=jnp.asarray(segments), scores=how, local=local,
                implementation=implementation,
            )  # fmt: skip
            return jnp.sum(out.astype(jnp.float32) * weight), out

        return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

    for flag in (True, False) if local == "traced" else (True,):
        given = jnp.array(flag) if local == "traced" else flag
        with jax.default_matmul_precision("highest"):
            wide = [x.astype(jnp.float32) for x in qkv]
            wanted, plain = run(*wide, given, "xla")
        found, out = run(*qkv, given, "cudnn")
        for one, two in zip((out, *found), (plain, *wanted), strict=True):
            np.testing.assert_allclose(
                one.astype(jnp.float32), two, atol=0.01 * float(jnp.abs(two).max())
            )


@pytest.mark.parametrize(
    ("how", "local", "K", "H", "copies"),
    [
        (Scores(scale=0.1), True, 2, 128, 2),
        (Scores(scale=0.1, window=100), True, 4, 64, 1),
        (Scores(scale=0.3, soft_cap=2.0, window=100), "traced", 1, 128, 2),
    ],
)
def test_the_kernel_for_tpus_equals_the_plain_one(
    how, local, K, H, copies, monkeypatch
):
    """Interpreted on the CPU, two blocks a side: packed documents, gradients too.

    The queries' are made with the others' while there are copies to keep them in.
    """
    monkeypatch.setattr(splash, "_block", lambda: 128)
    monkeypatch.setattr(splash, "COPIES", copies)
    B, T, N = 1, 256, 4
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((B, T, N, H), (B, T, K, H), (B, T, K, H))
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    segments = jnp.repeat(jnp.arange(3), jnp.array([30, 150, 76]))[None]

    def run(q, k, v, local, implementation):
        out = attend(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, scores=how,
            local=local, implementation=implementation,
        )  # fmt: skip
        return jnp.sum(jnp.sin(3 * out)), out

    for flag in (True, False) if local == "traced" else (True,):
        given = jnp.array(flag) if local == "traced" else flag
        grad = jax.value_and_grad(run, (0, 1, 2), has_aux=True)
        (_, plain), wanted = grad(q, k, v, given, "xla")
        (_, out), found = grad(q, k, v, given, "splash_interpreted")
        np.testing.assert_allclose(out, plain, atol=2e-6)
        for one, two in zip(found, wanted, strict=True):
            np.testing.assert_allclose(one, two, atol=1e-5 * float(jnp.abs(two).max()))
