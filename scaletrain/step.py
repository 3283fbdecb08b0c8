"""The training and evaluation steps: pure functions of arrays, no I/O."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, UInt

from scaletrain import optim, sharding
from scaletrain.losses import LossSums
from scaletrain.models import quantised
from scaletrain.optim.accumulation import Gradient
from scaletrain.program import Batch, Program, TrainState, combined

Tree = Any


def train_step(
    state: TrainState, batch: Batch, *, program: Program
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one optimizer step, and its metrics as scalars.

    Args:
      state: the state before the step.
      batch: see `objective.Batch`; the rows of all micro-batches.
      program: the run's model, objective and optimizer; static.
    """
    history = quantised.shifted(state.amax)
    keyed = batch | {"key": _row_keys(state.key, state.step, batch["tokens"])}
    (_, sums), (grads, amax) = _gradient(program)(
        state.params, quantised.expected(history), state.frozen, keyed
    )
    finite = quantised.all_finite(amax)
    rate = optim.schedule(program.run)(state.step - state.opt_state.skipped)
    with jax.named_scope("optimizer"):
        updates, new = program.tx.update(
            _sharded_as_params(grads, program),
            state.opt_state,
            state.params,
            loss=sums.loss,
            tokens=sums.weight,
            finite=finite,
        )
        params = optax.apply_updates(state.params, updates)
    guard = cast(optim.GuardState, new)
    metrics = {
        "loss": guard.loss,
        "grad_norm": guard.grad_norm,
        "loss_limit": guard.limits[0],
        "grad_norm_limit": guard.limits[1],
        "learning_rate": rate,
        "tokens": sums.weight,
        "skipped": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
        "batch_hash": _hash(batch["tokens"]),
    }
    history = quantised.recorded(history, amax, finite)
    return TrainState(
        state.step + 1, params, state.frozen, guard, state.key, history
    ), metrics


def _gradient(program: Program) -> Gradient:
    """Returns the function that computes the gradient of the objective of a batch.

    Devices along `data` have the same weights, and sum their gradients once, after the
    last micro-batch. Along `fsdp` the gradient of each micro-batch is reduce-scattered,
    because no device has room for a full gradient.
    """
    run, replicas = program.run, program.mesh.shape["data"]
    loss = functools.partial(_objective, program=program)
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    if run.accumulate_steps == 1:
        return grad
    grad = optim.accumulated(grad, run.optim.accumulate, run.accumulate_steps)
    if replicas == 1:
        return grad

    def local(params: Tree, amax: Tree, frozen: Tree, batch: Batch) -> Any:
        loss_and_sums, (grads, new_amax) = grad(params, amax, frozen, batch)
        # Along fsdp and tensor each device keeps its shard of the gradients.
        grads = _sharded_as_params(grads, program)
        # XLA's CPU compiler fails at sums of fewer than 32 bits here.
        low = run.precision.gradients if sharding.platform() != "cpu" else "float32"
        sent = jax.tree.map(lambda g: g.astype(low), grads)
        loss_and_sums, sent = jax.lax.psum((loss_and_sums, sent), "data")
        grads = jax.tree.map(lambda s, g: s.astype(g.dtype), sent, grads)
        return loss_and_sums, (grads, jax.lax.pmax(new_amax, "data"))

    replicated = jax.P()
    return sharding.by_device(
        local,
        (replicated, replicated, replicated, jax.P("data")),
        replicated,
        axes=("data",),
    )


def _sharded_as_params(grads: Tree, program: Program) -> Tree:
    """Returns gradients with the shardings of their parameters."""
    return jax.tree.map(
        lambda g, p: jax.lax.with_sharding_constraint(g, p.sharding.spec),
        grads,
        program.state.params,
    )


def _objective(
    params: Tree, amax: Tree, frozen: Tree, batch: Batch, *, program: Program
) -> tuple[jax.Array, LossSums]:
    """Returns the objective of one micro-batch in training, and its sums."""
    variables = combined(combined(params, frozen), amax)
    model = nnx.merge(program.train_graphdef, variables)
    return program.objective(model, batch, program.run)


def eval_step(weights: Tree, batch: Batch, *, program: Program) -> LossSums:
    """Returns the loss sums of one batch, without dropout or quantised matmuls.

    Args:
      weights: every parameter of the model.
      batch: see `objective.Batch`.
      program: the run's model and objective; static.
    """
    model = nnx.merge(program.eval_graphdef, weights)
    return program.objective(model, batch, program.run)[1]


def logits_step(
    weights: Tree, tokens_BT: Int[Array, "B T"], *, program: Program
) -> tuple[Float[Array, "B T V"], Float[Array, " B"]]:
    """Returns the logits of documents and the summed loss of each, in nats.

    Args:
      weights: every parameter of the model.
      tokens_BT: a document a row.
      program: the run's model; static.
    """
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    model = nnx.merge(program.eval_graphdef, weights)
    logits_BTV = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    log_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    picked_BT = jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return logits_BTV, -jnp.sum(picked_BT, axis=1)


def _hash(tokens_BT: Int[Array, "B T"]) -> UInt[Array, ""]:
    """Returns a hash of a batch that does not depend on the order of its rows.

    Each row's sum of tokens times odd numbers is mixed by shifts and a product, as in
    multiplicative hashing: 2654435761 is Knuth's multiplier, 2^32 over the golden
    ratio; 2246822519 is one of xxHash's primes.
    """
    T = tokens_BT.shape[1]
    odd_T = jnp.arange(T, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
    row_B = jnp.sum((tokens_BT + 1).astype(jnp.uint32) * odd_T[None], axis=1)
    row_B = (row_B ^ (row_B >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(row_B ^ (row_B >> 13))


def _row_keys(
    key: UInt[Array, "2"], step: Int[Array, ""], tokens_BT: Int[Array, "B T"]
) -> jax.Array:
    """Returns a random key for each row, from the run's key, the step and the row.

    A row is identified by the hash of its tokens: its index differs between micro-batch
    sizes and meshes.

    Args:
      key: the run's key, as data.
      step: optimizer steps taken.
      tokens_BT: the rows.
    """
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return jax.vmap(lambda row_T: jax.random.fold_in(step_key, _hash(row_T[None])))(
        tokens_BT
    )
