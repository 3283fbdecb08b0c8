"""Muon's directions against singular value decompositions, optax's, and a mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import small

from scaletrain import mesh
from scaletrain.config import MeshConfig
from scaletrain.optim import chain, muon

SHAPES = {"wide": (64, 256), "tall": (192, 64), "square": (96, 96)}


def stack(rows, columns):
    """Returns matrices of small numbers with flat, falling and few singular values."""
    rng = np.random.default_rng(rows)
    small = min(rows, columns)
    values = np.stack(
        [
            np.ones(small),
            np.arange(1, small + 1) ** -0.5,
            np.arange(1, small + 1) ** -1.0,
            np.where(np.arange(small) < 8, 1, 1e-2),
        ]
    )
    u = np.linalg.qr(rng.standard_normal((4, rows, small)))[0]
    v = np.linalg.qr(rng.standard_normal((4, columns, small)))[0]
    return 1e-6 * (u * values[:, None]) @ v.swapaxes(1, 2)


def cosines(one, two):
    norms = np.linalg.norm(one, axis=(1, 2)) * np.linalg.norm(two, axis=(1, 2))
    return (one * two).sum(axis=(1, 2)) / norms


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_become_equal(shape, dtype):
    """In the band, and nearer to the polar factor than optax's five iterations are."""
    x = jnp.asarray(stack(*SHAPES[shape]), dtype)
    y = np.asarray(muon.orthogonalised(x).astype("float32"), np.float64)
    u, before, v = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    after = np.einsum("lms,lmn,lsn->ls", u, y, v)
    norms = (before**8).sum(axis=1, keepdims=True) ** (1 / 8)
    counted = before > 1.1 * muon.SMALLEST * norms
    low, high = muon.BAND
    rounded = 0.08 if dtype == "bfloat16" else 0.0
    assert (after[counted] > low - rounded).all()
    assert np.linalg.norm(y, 2, axis=(1, 2)).max() < high + rounded / 4
    near = cosines(y, u @ v)
    assert (near > 0.99).all()
    transform = optax.contrib.scale_by_muon(
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(1, 2)
    )
    theirs = transform.update(x, transform.init(x))[0]
    assert (near > cosines(np.asarray(theirs, np.float64), u @ v) - 2e-3).all()


def test_small_gradients_count_and_none_stays_none():
    x = jnp.zeros((3, 8, 16)).at[1, 0, 0].set(1e-17).at[2, 0, 0].set(1e-25)
    y = muon.orthogonalised(x)
    assert not y[0].any()
    assert 0.8 < y[1, 0, 0] < 1.2
    assert 0 < y[2, 0, 0] < 1e-6


def test_trains_as_optax_does(monkeypatch):
    """Each kind of parameter gets its transformation, its momentum and its scale."""
    run = small.changed(small.RUN, optim__name="muon", optim__learning_rate=3e-3)
    batches = [small.random_batch(run, seed % 2) for seed in range(20)]

    def losses():
        taken = small.Taken(run)
        return [taken.step(batch)["loss"] for batch in batches]

    ours = losses()

    def theirs(run, logical):
        dims = jax.tree.map(
            lambda axes: _dimensions(axes) if chain._takes_muon(axes) else None,
            logical,
            is_leaf=lambda x: isinstance(x, tuple),
        )
        o = run.optim
        return optax.contrib.muon(
            -1.0, adam_b1=o.b1, adam_b2=o.b2, eps=o.eps, consistent_rms=muon.RMS,
            muon_weight_dimension_numbers=dims,
        )  # fmt: skip

    monkeypatch.setitem(chain._DIRECTIONS, "muon", theirs)
    plain = losses()
    assert plain[-1] < plain[0] - 0.3
    np.testing.assert_allclose(ours[:4], plain[:4], rtol=2e-3)
    np.testing.assert_allclose(ours, plain, rtol=2e-2)


def _dimensions(axes):
    others = tuple(i for i in range(1, len(axes)) if axes[i] != "embed")
    embed = (axes.index("embed"),)
    sides = (embed, others) if embed == (1,) else (others, embed)
    return optax.contrib.MuonDimensionNumbers(*sides)


@pytest.mark.parametrize(
    ("layers", "axes", "held"),
    [
        (6, {"fsdp": 4, "tensor": 2}, 1),
        (16, {"data": 2, "fsdp": 4}, 2),
        (3, {"data": 4, "fsdp": 2}, 1),
        (1, {"data": 8}, 1),
    ],
)
def test_no_device_computes_what_another_does(layers, axes, held):
    """Whole matrices lie on devices of their own, by exchanges alone."""
    grid = mesh.build(MeshConfig(**axes))
    x = jax.random.normal(jax.random.key(0), (layers, 16, 4, 8))
    seen = []

    def doubled(x):
        seen.append(x.shape)
        return 2 * x

    names = ("layers", "embed", "heads", "head_dim")
    with jax.set_mesh(grid):
        run = jax.jit(lambda x: muon._by_layers(doubled, x, names)).lower(x).compile()
        np.testing.assert_array_equal(run(x), 2 * x)
    assert seen[-1] == (held, 16, 4, 8)
    text = run.as_text()
    assert ("all-to-all" in text) == ("fsdp" in axes)
    assert ("all-gather" in text) == (layers > 1 and "data" in axes)
