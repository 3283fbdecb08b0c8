"""The step: one result however it is cut, and nothing that is not finite gets in."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from scaletrain import mesh, step
from scaletrain.config import AxesConfig, MeshConfig
from scaletrain.errors import ConfigError
from scaletrain.program import build


@pytest.fixture(scope="module")
def alone():
    return small.Taken(small.RUN).losses(8)


CUTS = {
    "data2 fsdp2 tensor2": {"mesh": MeshConfig(data=2, fsdp=2, tensor=2)},
    "data8": {"mesh": MeshConfig(data=8)},
    "fsdp8": {"mesh": MeshConfig(fsdp=8)},
    "tensor2": {"mesh": MeshConfig(tensor=2)},
    "fsdp4 context2": {"mesh": MeshConfig(fsdp=4, context=2)},
    "dcn": {"mesh": MeshConfig(fsdp=2, tensor=2, dcn=AxesConfig(data=2))},
    "accumulate": {"accumulate_steps": 4},
    "multi_steps": {"accumulate_steps": 4, "optim__accumulate": "multi_steps"},
    "accumulate fsdp4": {"accumulate_steps": 4, "mesh": MeshConfig(fsdp=4)},
    "accumulate data2 fsdp2 tensor2": {
        "accumulate_steps": 4,
        "mesh": MeshConfig(data=2, fsdp=2, tensor=2),
    },
    "multi_steps fsdp4": {
        "accumulate_steps": 4,
        "optim__accumulate": "multi_steps",
        "mesh": MeshConfig(fsdp=4),
    },
}


# On one device they are taken below, with dropout.
@pytest.mark.parametrize(
    "cut", [c for c in CUTS if c not in ("accumulate", "multi_steps")]
)
def test_one_result_however_the_batch_is_cut(alone, cut):
    losses = small.Taken(small.changed(small.RUN, **CUTS[cut])).losses(8)
    np.testing.assert_allclose(losses, alone, rtol=1e-4)


DROPPING = small.changed(small.RUN, model__dropout=0.2)


@pytest.fixture(scope="module")
def dropping():
    return small.Taken(DROPPING).losses(2)


@pytest.mark.parametrize("cut", ["data2 fsdp2 tensor2", "accumulate", "multi_steps"])
def test_dropout_does_not_depend_on_the_cut(alone, dropping, cut):
    assert dropping != alone[:2]
    losses = small.Taken(small.changed(DROPPING, **CUTS[cut])).losses(2)
    np.testing.assert_allclose(losses, dropping, rtol=1e-4)


def test_batch_hash_knows_its_rows_whatever_their_order():
    tokens = jnp.asarray(small.random_batch(small.RUN, 0)["tokens"])
    assert step._hash(tokens) == step._hash(tokens[::-1])
    assert step._hash(tokens) == step._hash(tokens[:8]) + step._hash(tokens[8:])
    assert step._hash(tokens) != step._hash(tokens.at[3, 5].add(1))
    swapped = tokens.at[0, :2].set(tokens[0, 1::-1])
    assert step._hash(tokens) != step._hash(swapped)


@pytest.mark.parametrize("mode", ["whole", "microbatch", "multi_steps"])
def test_what_is_not_finite_never_reaches_the_state(mode):
    """One poisoned row: the update is skipped whole and counted; the next one works.

    The row is on one of four devices, and in one part of a batch that is cut.
    """
    run = small.changed(
        small.RUN,
        mesh=MeshConfig(fsdp=4),
        optim__spike_sigma=3.0,
        optim__spike_window=8,
    )
    if mode != "whole":
        run = small.changed(run, accumulate_steps=4, optim__accumulate=mode)
    taken = small.Taken(run)
    start = jax.device_get(taken.state)
    layout = jax.tree.map(lambda leaf: leaf.sharding, taken.program.state)
    batches = [small.random_batch(run, seed) for seed in range(3)]

    def begun():
        taken.state = jax.device_put(start, layout)
        taken.step(batches[0])
        return jax.device_get(taken.state.params)

    before = begun()
    clean = taken.step(batches[2])
    after = jax.device_get(taken.state.params)
    for poison in (np.nan, np.inf):
        begun()
        bad = batches[1]["weights"].copy()
        bad[5, 3] = poison
        numbers = taken.step(batches[1] | {"weights": bad})
        assert (numbers["skipped"], numbers["skipped_in_a_row"]) == (1, 1)
        hurt = jax.device_get(taken.state.params)
        jax.tree.map(np.testing.assert_array_equal, before, hurt)
        assert int(taken.state.step) == 2
        numbers = taken.step(batches[2])
        assert (numbers["skipped"], numbers["skipped_in_a_row"]) == (1, 0)
        # The schedule counts updates, so that the skipped step left no trace at all.
        assert numbers["loss"] == clean["loss"]
        assert numbers["learning_rate"] == clean["learning_rate"]
        hurt = jax.device_get(taken.state.params)
        jax.tree.map(np.testing.assert_array_equal, after, hurt)
    for seed in range(3, 9):
        taken.step(small.random_batch(run, seed))
    # A finite spike: one token outweighs all, whose gradients no longer cancel.
    before = jax.device_get(taken.state.params)
    bad = batches[1]["weights"].copy()
    bad[5, 3] = 1e8
    numbers = taken.step(batches[1] | {"weights": bad})
    assert numbers["grad_norm_limit"] < numbers["grad_norm"] < np.inf
    assert (numbers["skipped"], numbers["skipped_in_a_row"]) == (2, 1)
    hurt = jax.device_get(taken.state.params)
    jax.tree.map(np.testing.assert_array_equal, before, hurt)


def test_z_loss_pulls_the_partition_function_down():
    def log_z(weight):
        taken = small.Taken(small.changed(small.RUN, optim__z_loss=weight))
        batch = small.random_batch(small.RUN, 0)
        for _ in range(10):
            taken.step(batch)
        judge = jax.jit(functools.partial(step.eval_step, program=taken.program))
        sums = judge(taken.state.params, batch)
        return float(sums.z / sums.weight)

    assert log_z(0.1) < log_z(0.0)


def test_state_is_donated_and_stays_where_it_is():
    taken = small.Taken(small.changed(small.RUN, mesh=MeshConfig(fsdp=8)))
    before = taken.state
    layout = jax.tree.map(lambda x: x.sharding, before)
    taken.step(small.random_batch(small.RUN, 0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    assert jax.tree.map(lambda x: x.sharding, taken.state) == layout


def test_ten_steps_are_golden(request):
    """Other processors round in another order: 1e-5, where steps differ by 1e-2."""
    path = pathlib.Path(__file__).parent / "golden" / "losses.txt"
    losses = small.Taken(small.RUN).losses(10)
    if request.config.getoption("--update-golden"):
        path.write_text("".join(f"{loss!r}\n" for loss in losses))
    wanted = [float(line) for line in path.read_text().splitlines()]
    np.testing.assert_allclose(losses, wanted, rtol=1e-5)


def test_parameter_table_is_golden(golden):
    from scaletrain import sharding

    run = small.changed(small.RUN, mesh=MeshConfig(fsdp=2, tensor=2))
    golden(
        "parameters.txt", sharding.table(small.Taken(run).program.state.params) + "\n"
    )


def test_weights_are_gathered_and_gradients_scattered_by_fsdp():
    """The compiled step keeps no replicated weight and loses no collective."""
    run = small.changed(small.RUN, mesh=MeshConfig(fsdp=8))
    text = small.Taken(run).execute.as_text()
    assert "all-gather" in text
    assert "reduce-scatter" in text or "all-reduce" in text


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_of_other_devices_is_refused(kernel):
    run = small.changed(
        small.RUN, model__attention=kernel, seq_len=128, precision__compute="bfloat16"
    )
    with pytest.raises(ConfigError, match=f"attention={kernel}; a kernel for a .PU, "):
        build(run, mesh.build(run.mesh, jax.devices()[:1]))
