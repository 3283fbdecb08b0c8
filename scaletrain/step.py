"""The training and evaluation steps: pure functions of arrays, jitted, no I/O."""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt

from scaletrain import config, optim, sharding
from scaletrain.config import PrecisionConfig, RunConfig
from scaletrain.errors import ConfigError
from scaletrain.hardware import chips
from scaletrain.losses import Head, LossSums, head_loss
from scaletrain.models import Decoder

HISTORY = 16  # optimizer steps whose largest magnitudes scale the next one
Batch = dict[str, Any]  # tokens, targets, segments, positions, weights: [B, T]
Tree = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that changes from step to step: arrays, or their shapes or shardings."""

    step: Any  # optimizer steps taken
    params: Tree  # what is trained
    frozen: Tree  # what is not: the weights beside adapters
    opt_state: Any
    key: Any  # the run's random key, as data
    amax: Tree  # [HISTORY, ...] largest magnitudes met, the newest first

    @property
    def weights(self) -> Tree:
        """Every parameter of the model."""
        return _joined(self.params, self.frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A run's step, what it takes and where that lies on the mesh."""

    run: RunConfig
    mesh: Mesh | AbstractMesh
    graphdef: Any  # as it is evaluated: nothing is quantised
    trained: Any  # as it is trained
    tx: optax.GradientTransformation
    state: TrainState  # shapes with shardings
    batch: Batch  # shapes with shardings


def train_step(
    state: TrainState, batch: Batch, *, program: Program
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Returns the state after one batch, and the numbers it gave.

    With optim.accumulate=multi_steps a batch is one part of an optimizer step, and
    the numbers count once its last part is done.
    """
    run = program.run
    batch_hash = _hash(batch["tokens"])
    batch["key"] = _row_keys(state.key, state.step, batch["tokens"])

    first = jnp.asarray(getattr(state.opt_state, "mini_step", 0)) == 0
    amax = _begun(state.amax, first)
    expected = jax.tree.map(lambda history: jnp.max(history[1:], axis=0), amax)
    grad = _gradient(program)
    (_, sums), (grads, met) = grad(state.params, expected, state.frozen, batch)
    bad = _not_finite(met)
    grads = _laid_out(grads, program)

    rate = optim.schedule(run)(state.step - optim.guard_of(state.opt_state).skipped)
    sums = optim.Sums(grads, sums.loss, sums.weight, bad)
    whole = optim.as_sums(state.params)
    with jax.named_scope("optimizer"):
        updates, opt_state = program.tx.update(sums, state.opt_state, whole)
        params = optax.apply_updates(state.params, cast(optim.Sums, updates).params)
    guard = optim.guard_of(opt_state)
    metrics = {
        "loss": guard.loss,
        "grad_norm": guard.grad_norm,
        "loss_limit": guard.limits[0],
        "grad_norm_limit": guard.limits[1],
        "learning_rate": rate,
        "tokens": sums.weight,
        "skipped": guard.skipped,
        "skipped_in_a_row": guard.skipped_in_a_row,
        "batch_hash": batch_hash,
    }
    ended = getattr(opt_state, "mini_step", 0) == 0
    state = dataclasses.replace(
        state,
        step=state.step + ended,
        params=params,
        opt_state=opt_state,
        amax=_recorded(amax, met, bad == 0),
    )
    return state, metrics


# Sums of micro-batches are added; of the magnitudes they meet, the largest counts.
_ADDED = optax.microbatching.AccumulationType.SUM
_LARGEST = optax.microbatching.Accumulator(
    init=lambda values: jax.tree.map(jnp.zeros_like, values),
    update=lambda carry, values, _: jax.tree.map(jnp.maximum, carry, values),
    finalize=lambda carry: carry,
    aggregate=lambda values: jax.tree.map(lambda x: jnp.max(x, axis=0), values),
)
_ACCUMULATED = (_ADDED, (_ADDED, _LARGEST))  # (loss, sums), (gradients, magnitudes)


def _gradient(program: Program) -> Callable[..., Any]:
    """Returns the gradient of `_objective`, of a batch in as many parts as asked for.

    Devices along `data` hold the same weights, and meet once: after their last part.
    Along `fsdp` every part is summed, for nobody has the room to hold the whole.
    """
    run, ways = program.run, program.mesh.shape["data"]
    loss = functools.partial(_objective, program=program)
    grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    parts = run.accumulate_steps if run.optim.accumulate == "microbatch" else 1
    if parts == 1:
        return grad
    rows = run.batch_size // parts // ways
    grad = optax.microbatching.microbatch(grad, 3, rows, _ACCUMULATED)
    if ways == 1:
        return grad

    def here(params: Tree, expected: Tree, frozen: Tree, batch: Batch) -> Any:
        loss_and_sums, (grads, met) = grad(params, expected, frozen, batch)
        grads = _laid_out(grads, program)  # so that each meets its own shard
        # The compiler of CPUs fails at sums of fewer than 32 bits here.
        low = run.precision.gradients if sharding.platform() != "cpu" else "float32"
        sent = jax.tree.map(lambda g: g.astype(low), grads)
        loss_and_sums, sent = jax.lax.psum((loss_and_sums, sent), "data")
        grads = jax.tree.map(lambda s, g: s.astype(g.dtype), sent, grads)
        return loss_and_sums, (grads, jax.lax.pmax(met, "data"))

    whole = jax.P()
    return sharding.by_device(
        here, (whole, whole, whole, jax.P("data")), whole, axes=("data",)
    )


def _laid_out(grads: Tree, program: Program) -> Tree:
    """Returns gradients that lie on the mesh like their parameters."""
    return jax.tree.map(
        lambda g, p: jax.lax.with_sharding_constraint(g, p.sharding.spec),
        grads,
        program.state.params,
    )


def _begun(amax: Tree, first: Bool[Array, ""]) -> Tree:
    """Returns the histories with room for a step's magnitudes, if it is new."""

    def shifted(history: jax.Array) -> jax.Array:
        return jnp.roll(history, 1, axis=0).at[0].set(0)

    return jax.tree.map(lambda h: jnp.where(first, shifted(h), h), amax)


def _recorded(amax: Tree, met: Tree, good: Bool[Array, ""]) -> Tree:
    """Returns the histories with what a call met, unless that was not finite."""

    def with_newest(history: jax.Array, met: jax.Array) -> jax.Array:
        return history.at[0].max(jnp.where(good, met, 0))

    return jax.tree.map(with_newest, amax, met)


def _not_finite(met: Tree) -> Float[Array, ""]:
    """Returns 1 if a magnitude is not finite, else 0.

    What is clipped to a scale of the past hides an infinity from the loss.
    """
    found = [~jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(met)]
    return jnp.any(jnp.array(found)).astype(jnp.float32) if found else jnp.zeros(())


def eval_step(weights: Tree, batch: Batch, *, program: Program) -> LossSums:
    """Returns the summed loss of one batch, without dropout."""
    return _loss(nnx.merge(program.graphdef, weights), batch, program.run)[1]


def logits_step(
    weights: Tree, tokens_BT: Int[Array, "B T"], *, program: Program
) -> tuple[Float[Array, "B T V"], Float[Array, " B"]]:
    """Returns the logits of whole documents and the summed loss of each, in nats."""
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32)[None], (B, T))
    model = nnx.merge(program.graphdef, weights)
    logits_BTV = model(tokens_BT, positions_BT, jnp.ones_like(tokens_BT))
    log_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
    told_BT = jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
    return logits_BTV, -jnp.sum(told_BT, axis=1)


def _objective(
    params: Tree, expected: Tree, frozen: Tree, batch: Batch, *, program: Program
) -> tuple[jax.Array, LossSums]:
    """Returns what is differentiated: the summed loss with its z-loss."""
    model = nnx.merge(program.trained, _joined(_joined(params, frozen), expected))
    return _loss(model, batch, program.run)


def _loss(model: Decoder, batch: Batch, run: RunConfig) -> tuple[jax.Array, LossSums]:
    """Returns the objective and its sums; with keys in the batch, with dropout."""
    x_BTD = model.features(
        batch["tokens"], batch["positions"], batch["segments"], batch.get("key")
    )
    head = Head(
        precision=run.precision,
        vocab_first=run.model.head == "tied",
        soft_cap=run.model.logit_soft_cap,
        z_loss=run.optim.z_loss,
        trained=run.lora.rank == 0,
    )
    with jax.named_scope("head"):
        return head_loss(head, x_BTD, model.output, batch["targets"], batch["weights"])


def _hash(tokens_BT: Int[Array, "B T"]) -> UInt[Array, ""]:
    """Returns a number that tells two batches apart, whatever the order of rows."""
    T = tokens_BT.shape[1]
    odd_T = jnp.arange(T, dtype=jnp.uint32) * jnp.uint32(2654435761) | jnp.uint32(1)
    row_B = jnp.sum((tokens_BT + 1).astype(jnp.uint32) * odd_T[None], axis=1)
    row_B = (row_B ^ (row_B >> 15)) * jnp.uint32(2246822519)
    return jnp.sum(row_B ^ (row_B >> 13))


def _row_keys(
    key: UInt[Array, "2"], step: Int[Array, ""], tokens_BT: Int[Array, "B T"]
) -> jax.Array:
    """Returns a random key for each row, from the run's key, the step and the row.

    The row is known by its tokens: its place differs between ways to cut a batch.
    """
    step_key = jax.random.fold_in(jax.random.wrap_key_data(key), step)
    return jax.vmap(lambda row_T: jax.random.fold_in(step_key, _hash(row_T[None])))(
        tokens_BT
    )


def _joined(one: Tree, two: Tree) -> Tree:
    """Returns two nested dicts without a common leaf as one."""
    both = {**one, **two}
    for name in one.keys() & two.keys():
        both[name] = _joined(one[name], two[name])
    return both


def _parted(weights: Tree, run: RunConfig) -> tuple[Tree, Tree, Tree]:
    """Returns a nested dict in parts: what is trained, what is frozen, magnitudes."""

    def part(name: str) -> int:
        if name == "amax":
            return 2
        return int(run.lora.rank > 0 and not name.startswith("lora_"))

    def pick(tree: Tree, wanted: int) -> Tree:
        found = {}
        for name, value in tree.items():
            if isinstance(value, dict):
                value = pick(value, wanted)
                if value:
                    found[name] = value
            elif part(name) == wanted:
                found[name] = value
        return found

    trained, frozen, amax = (pick(weights, wanted) for wanted in range(3))
    return trained, frozen, amax


def _as_multiplied(frozen: Tree, run: RunConfig) -> Tree:
    """Returns `frozen` with its matrices in the precision they are multiplied in.

    Nothing updates them, so the bits that a matmul would drop are not kept. Norms and
    biases are used in `precision.reduce` and stay as they are.
    """

    def cast(path: Any, leaf: jax.Array) -> jax.Array:
        is_matrix = path[-1].key in ("weight", "embedding", "positions")
        return leaf.astype(run.precision.compute) if is_matrix else leaf

    return jax.tree.map_with_path(cast, frozen)


def initial_state(run: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the same on every mesh."""
    key = jax.random.key(run.seed)
    model_key, run_key = jax.random.split(key)
    model = Decoder(run.model, run.precision, model_key, run.lora)
    return _first_state(run, tx, nnx.to_pure_dict(nnx.state(model)), run_key)


def _first_state(
    run: RunConfig, tx: optax.GradientTransformation, weights: Tree, key: jax.Array
) -> TrainState:
    """Returns the state that a run begins with, of its weights and its random key."""
    params, frozen, amax = _parted(weights, run)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=_as_multiplied(frozen, run),
        opt_state=tx.init(optim.as_sums(params)),
        key=jax.random.key_data(key),
        amax=jax.tree.map(lambda leaf: jnp.zeros((HISTORY, *leaf.shape)), amax),
    )


_ATTENTION_OF = {"splash": "tpu", "cudnn": "gpu"}  # platforms of kernels


def _with_attention(run: RunConfig, mesh: Mesh | AbstractMesh) -> RunConfig:
    """Returns `run` with the attention that its mesh gets."""
    asked = run.model.attention
    devices = mesh.devices if isinstance(mesh, Mesh) else None
    platform = devices.flat[0].platform if devices is not None else ""
    wanted = _ATTENTION_OF.get(asked, platform)
    if platform and platform != wanted:
        raise ConfigError(
            [
                f"model.attention={asked}; a kernel for a {wanted.upper()}, and the "
                f"devices are {platform}; use auto or xla."
            ]
        )
    if asked == "auto":
        kernels = [name for name, its in _ATTENTION_OF.items() if its == platform]
        able = [name for name in kernels if not config.unable(run, name)]
        model = dataclasses.replace(run.model, attention=(able or ["xla"])[0])
        run = dataclasses.replace(run, model=model)
    return run


def _check_units(run: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Refuses matmuls that the mesh's devices have no units for."""
    asked = run.precision.matmul
    if asked == "compute" or not isinstance(mesh, Mesh):
        return
    kind = mesh.devices.flat[0].device_kind
    able = ["compute", *chips.low_precision(kind)]
    if asked not in able:
        raise ConfigError(
            [
                f"precision.matmul={asked}; {kind} is not known to multiply it faster "
                f"than {run.precision.compute}; use {' or '.join(able)}."
            ]
        )


def build(run: RunConfig, mesh: Mesh | AbstractMesh) -> Program:
    """Returns the program of a resolved run on a mesh; holds no device memory.

    Raises:
      ConfigError: an attention or matmuls that the mesh's devices do not have.
    """
    run = _with_attention(run, mesh)
    _check_units(run, mesh)
    key = jax.random.key(run.seed)

    def parts(precision: PrecisionConfig) -> tuple[Any, Any]:
        make = functools.partial(Decoder, run.model, precision, key, run.lora)
        return nnx.split(nnx.eval_shape(make))

    trained, abstract = parts(run.precision)
    plain = run.precision.plain
    logical, logical_frozen, _ = _parted(sharding.logical_axes(abstract), run)
    tx = optim.optimizer(run, logical)
    begin = functools.partial(_first_state, run, tx)
    state = jax.eval_shape(begin, nnx.to_pure_dict(abstract), key)
    params = sharding.of_params(state.params, logical, mesh)
    frozen = sharding.of_params(state.frozen, logical_frozen, mesh)
    layout = sharding.of_state(state, state.params, params, mesh)
    layout = dataclasses.replace(layout, frozen=frozen)

    def placed(leaf, where):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)

    rows = run.batch_size
    if run.optim.accumulate == "multi_steps":
        rows //= run.accumulate_steps
    where = NamedSharding(mesh, sharding.spec("batch", "tokens"))
    dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32)
    batch = {
        name: jax.ShapeDtypeStruct((rows, run.seq_len), dtype, sharding=where)
        for name, dtype in (dtypes | {"weights": jnp.float32}).items()
    }
    return Program(
        run=run,
        mesh=mesh,
        graphdef=trained if plain == run.precision else parts(plain)[0],
        trained=trained,
        tx=tx,
        state=jax.tree.map(placed, state, layout),
        batch=batch,
    )


def compiled(
    program: Program,
    options: dict[str, Any] | None = None,
    ready: Callable[[], Any] = lambda: None,
) -> Any:
    """Returns `train_step` compiled for the program's devices.

    An option that the compiler does not know is left out with a warning.

    Args:
      ready: called once the program is written down: it waits until the devices have
        nothing else to do, for the compiler takes the kernels that are fastest there.
    """
    kind = cast(Mesh, program.mesh).devices.flat[0].device_kind
    lowered = jitted(program).lower(program.state, program.batch)
    wanted = chips.compiler_options(kind) | (options or {})
    ready()
    while True:
        try:
            return lowered.compile(compiler_options=wanted)
        except jax.errors.JaxRuntimeError as err:
            unknown = [name for name in wanted if f"option: '{name}'" in str(err)]
            if not unknown:
                raise
            value = wanted.pop(unknown[0])
            warnings.warn(
                f"compiler option {unknown[0]}={value}; this compiler does not know "
                "it; it is left out, and the step may be slower.",
                stacklevel=2,
            )


def jitted(program: Program) -> Any:
    """Returns `train_step` with state donated and shardings pinned, ready to lower."""
    layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    whole = NamedSharding(program.mesh, jax.P())
    return jax.jit(
        functools.partial(train_step, program=program),
        in_shardings=(layout, {k: v.sharding for k, v in program.batch.items()}),
        out_shardings=(layout, whole),
        donate_argnums=0,
    )
