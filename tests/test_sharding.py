"""Layouts: what is split, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from scaletrain import mesh, sharding, train
from scaletrain.config import MeshConfig
from scaletrain.errors import ShardingError


def test_unknown_axis_is_refused_where_it_is_written():
    with pytest.raises(ShardingError, match="logical axis 'embd'.*no rule"):
        sharding.param(jax.random.key(0), (2,), "embd", std=1.0, dtype="float32")
    with pytest.raises(ShardingError, match="no rule has that name"):
        sharding.constrain(jnp.ones((2, 2)), "batch", "token")


def test_one_mesh_axis_for_two_dims_is_refused():
    with pytest.raises(ShardingError, match="mesh axis 'tensor' would split two dims"):
        sharding.spec("heads", "ff")
    with pytest.raises(ShardingError, match="mesh axis 'fsdp' would split two dims"):
        sharding.spec("batch", "embed")


def test_a_dim_that_does_not_divide_is_refused():
    grid = mesh.abstract(MeshConfig(tensor=4))
    with pytest.raises(ShardingError, match=r"w \(6, 8\).*6 does not divide.* = 4"):
        sharding.named(grid, "w", (6, 8), ("ff", "embed"))
    with pytest.raises(ShardingError, match="1 logical axes .* for 2 dims"):
        sharding.named(grid, "w", (6, 8), ("ff",))


def test_the_state_of_a_seed_is_the_same_on_every_mesh():
    whole = small.Taken(small.RUN).state
    cut = small.Taken(
        small.changed(small.RUN, mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    ).program
    with jax.set_mesh(cut.mesh):
        state = train.initial(cut, with_frozen=False)
    assert len(state.params["embedding"].sharding.device_set) == 8
    jax.tree.map(np.testing.assert_array_equal, whole, state)


def test_constrain_pins_the_layout():
    grid = mesh.build(MeshConfig(data=2, fsdp=2, tensor=2))
    with jax.set_mesh(grid):
        x = jax.jit(lambda x: sharding.constrain(x, "batch", "tokens", "ff"))(
            jnp.zeros((8, 4, 16))
        )
    assert x.sharding.shard_shape(x.shape) == (2, 4, 8)


@pytest.mark.parametrize(
    ("axes", "shape"),
    [
        ({}, (1, 1)),
        ({"data": 8}, (8, 1)),
        ({"data": 4, "tensor": 2}, (4, 1)),
        ({"fsdp": 4, "context": 2}, (4, 2)),
    ],
)
def test_rows_arrive_where_they_belong(axes, shape):
    run = small.changed(small.RUN, mesh=MeshConfig(**axes))
    taken = small.Taken(run)
    batch = small.random_batch(run, 0)
    assert sharding.local_rows(taken.program.batch["tokens"]) == list(range(16))
    placed = sharding.place(batch, taken.program.batch)
    for name, rows in batch.items():
        np.testing.assert_array_equal(placed[name], rows)
        parts = placed[name].sharding.shard_shape(rows.shape)
        assert parts == (16 // shape[0], 32 // shape[1])


def test_optimizer_state_lies_like_its_parameters():
    run = small.changed(small.RUN, mesh=MeshConfig(fsdp=2, tensor=2))
    program = small.Taken(run).program
    flat = jax.tree.flatten_with_path(program.state.opt_state)[0]
    moments = [
        leaf
        for path, leaf in flat
        if "'mlp'" in jax.tree_util.keystr(path)
        and "'up'" in jax.tree_util.keystr(path)
    ]
    wanted = program.state.params["blocks"]["mlp"]["up"]["weight"].sharding
    assert [leaf.sharding for leaf in moments] == [wanted, wanted]


def test_table_adds_up():
    run = small.changed(small.RUN, mesh=MeshConfig(fsdp=2, tensor=2))
    taken = small.Taken(run)
    text = sharding.table(taken.program.state.params)
    here = sum(
        leaf.addressable_shards[0].data.nbytes
        for leaf in jax.tree.leaves(taken.state.params)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(taken.state.params))
    assert text.splitlines()[-1].split() == [f"{count:,}", "parameters", f"{here:,}"]
