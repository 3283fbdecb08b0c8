"""A run's program: its step's state, shapes and shardings, built on a mesh.

`build` decides the setting that depends on the mesh (the attention kernel), and
allocates no device memory.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from scaletrain import config, objective, optim, sharding
from scaletrain.config import PrecisionConfig, RunConfig
from scaletrain.errors import ConfigError
from scaletrain.hardware import chips
from scaletrain.models import Decoder
from scaletrain.models.linear import Adapter
from scaletrain.models.quantised import Amax, empty_history
from scaletrain.objective import Batch, Objective

Tree = Any  # nested dicts mirroring the parameters


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The state of training between two steps: arrays, or their shapes or shardings."""

    step: Any  # optimizer steps taken
    params: Tree  # the weights that are trained
    frozen: Tree  # the weights under adapters, which are not trained
    opt_state: Any
    key: Any  # the run's random key, as data
    amax: Tree  # amax history [HISTORY, ...] of each fp8 tensor, the newest first

    @property
    def weights(self) -> Tree:
        """Every parameter of the model."""
        return combined(self.params, self.frozen)


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A run's model, objective and optimizer, and its inputs' shapes and shardings."""

    run: RunConfig
    mesh: Mesh | AbstractMesh
    eval_graphdef: Any  # no matmul is quantised
    train_graphdef: Any
    tx: optax.GradientTransformationExtraArgs
    objective: Objective
    state: TrainState  # shapes with shardings
    batch: Batch  # shapes with shardings


def combined(one: Tree, two: Tree) -> Tree:
    """Returns the nested dict with the leaves of two that have no leaf in common."""
    both = {**one, **two}
    for name in one.keys() & two.keys():
        both[name] = combined(one[name], two[name])
    return both


def partition(tree: Tree, roles: Tree, role: str) -> Tree:
    """Returns the nested dict of the leaves of `tree` that have `role`.

    Args:
      tree: nested dicts.
      roles: the role of each leaf, see `_roles`.
      role: "trained", "frozen" or "amax".
    """
    chosen = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            value = partition(value, roles[name], role)
            if value:
                chosen[name] = value
        elif roles[name] == role:
            chosen[name] = value
    return chosen


def _roles(variables: nnx.State, run: RunConfig) -> Tree:
    """Returns the role of every variable: "trained", "frozen" or "amax".

    It follows from the variable's type, which is given where it is created.
    """

    def role(variable: nnx.Variable) -> str:
        if isinstance(variable, Amax):
            return "amax"
        frozen = run.lora.rank > 0 and not isinstance(variable, Adapter)
        return "frozen" if frozen else "trained"

    return sharding.of_variables(variables, role)


def _as_multiplied(frozen: Tree, logical: Tree, run: RunConfig) -> Tree:
    """Returns `frozen` with its matrices in `precision.compute`.

    Nothing updates them, so bits that a matmul would drop need no memory. Norms and
    biases are used in `precision.reduce` and stay as they are.
    """

    def cast(leaf: jax.Array, axes: tuple[str, ...]) -> jax.Array:
        is_matrix = sharding.is_matrix(axes)
        return leaf.astype(run.precision.compute) if is_matrix else leaf

    return jax.tree.map(cast, frozen, logical)


def initial_state(run: RunConfig, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first step; the same on every mesh."""
    key = jax.random.key(run.seed)
    model_key, run_key = jax.random.split(key)
    model = Decoder(run.model, run.precision, model_key, run.lora)
    return _first_state(run, tx, nnx.state(model), run_key)


def _first_state(
    run: RunConfig,
    tx: optax.GradientTransformation,
    variables: nnx.State,
    key: jax.Array,
) -> TrainState:
    """Returns the first state of a run, from its weights and its random key.

    Args:
      run: the settings.
      tx: the optimizer.
      variables: the model's.
      key: the run's random key.
    """
    roles = _roles(variables, run)
    values = nnx.to_pure_dict(variables)
    params = partition(values, roles, "trained")
    logical = partition(sharding.logical_axes(variables), roles, "frozen")
    frozen = _as_multiplied(partition(values, roles, "frozen"), logical, run)
    amax = partition(values, roles, "amax")
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        frozen=frozen,
        opt_state=tx.init(params),
        key=jax.random.key_data(key),
        amax=jax.tree.map(empty_history, amax),
    )


def initial(program: Program, *, with_frozen: bool) -> TrainState:
    """Returns the initial state from the run's seed, on the program's devices.

    Args:
      with_frozen: whether weights that are not trained are drawn too; a run reads them
        from `init_from` instead.
    """
    layout = jax.tree.map(lambda leaf: leaf.sharding, program.state)
    if not with_frozen:
        layout = dataclasses.replace(layout, frozen={})

    def make() -> TrainState:
        state = initial_state(program.run, program.tx)
        return state if with_frozen else dataclasses.replace(state, frozen={})

    return jax.jit(make, out_shardings=layout)()


_ATTENTION_OF = {"splash": "tpu", "cudnn": "gpu"}  # platforms of kernels


def _with_attention(run: RunConfig, mesh: Mesh | AbstractMesh) -> RunConfig:
    """Returns `run` with the attention kernel for the devices of `mesh`."""
    asked = run.model.attention
    devices = mesh.devices if isinstance(mesh, Mesh) else None
    platform = devices.flat[0].platform if devices is not None else ""
    needed = _ATTENTION_OF.get(asked, platform)
    if platform and platform != needed:
        raise ConfigError(
            [
                f"model.attention={asked}; a kernel for a {needed.upper()}, and the "
                f"devices are {platform}; use auto or xla."
            ]
        )
    if asked == "auto":
        kernels = [name for name, each in _ATTENTION_OF.items() if each == platform]
        able = [name for name in kernels if not config.unable(run, name)]
        model = dataclasses.replace(run.model, attention=(able or ["xla"])[0])
        run = dataclasses.replace(run, model=model)
    return run


def _check_units(run: RunConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError for 8-bit matmuls that the mesh's devices lack units for."""
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
    """Returns the program of a resolved run on a mesh; allocates no device memory.

    Raises:
      ConfigError: an attention or matmuls that the mesh's devices do not have.
    """
    run = _with_attention(run, mesh)
    _check_units(run, mesh)
    key = jax.random.key(run.seed)

    def split(precision: PrecisionConfig) -> tuple[Any, nnx.State]:
        make = functools.partial(Decoder, run.model, precision, key, run.lora)
        return nnx.split(nnx.eval_shape(make))

    train_graphdef, variables = split(run.precision)
    plain = run.precision.plain
    logical, roles = sharding.logical_axes(variables), _roles(variables, run)
    trained = partition(logical, roles, "trained")
    tx = optim.optimizer(run, trained)
    state = jax.eval_shape(functools.partial(_first_state, run, tx), variables, key)
    params = sharding.of_params(state.params, trained, mesh)
    frozen = partition(logical, roles, "frozen")
    frozen = sharding.of_params(state.frozen, frozen, mesh)
    layout = sharding.of_state(state, state.params, params, mesh)
    layout = dataclasses.replace(layout, frozen=frozen)
    return Program(
        run=run,
        mesh=mesh,
        eval_graphdef=train_graphdef if plain == run.precision else split(plain)[0],
        train_graphdef=train_graphdef,
        tx=tx,
        objective=objective.next_token,
        state=jax.tree.map(_with_sharding, state, layout),
        batch=_batch(run, mesh),
    )


def _with_sharding(
    leaf: jax.ShapeDtypeStruct, layout: NamedSharding
) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=layout)


def _batch(run: RunConfig, mesh: Mesh | AbstractMesh) -> Batch:
    """Returns the shapes of a batch with their sharding."""
    layout = NamedSharding(mesh, sharding.spec("batch", "tokens"))
    shape = run.batch_size, run.seq_len
    dtypes = dict.fromkeys(("tokens", "targets", "segments", "positions"), jnp.int32)
    return {
        name: jax.ShapeDtypeStruct(shape, dtype, sharding=layout)
        for name, dtype in (dtypes | {"weights": jnp.float32}).items()
    }
