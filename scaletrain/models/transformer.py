"""The decoder-only language model.

Layers are one `Block` whose parameters carry a leading layer dim; `model.layers` says
whether `lax.scan` or an unrolled loop runs them. Both read the same parameters, so a
run may change from one to the other.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Key

from scaletrain.config import LoraConfig, ModelConfig, PrecisionConfig
from scaletrain.matrices import HEAD
from scaletrain.models import stack
from scaletrain.models.embedding import look_up
from scaletrain.models.layers import Attention, Norm, dropout
from scaletrain.models.linear import Linear
from scaletrain.models.mlp import Mlp
from scaletrain.models.product import project
from scaletrain.sharding import constrain, param


class Aux(NamedTuple):
    """The auxiliary results of a layer; of a stack, with a leading layer dim.

    A layer that returns more (a router's load, say) adds a field.
    """

    kv: tuple[Float[Array, "*L B S K H"], Float[Array, "*L B S K H"]] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of the slots decoded so far, of all layers."""

    k_LBSKH: Float[Array, "L B S K H"]
    v_LBSKH: Float[Array, "L B S K H"]
    segments_BS: Int[Array, "B S"]  # 0 = a slot that holds no token
    length: Int[Array, ""]  # slots in use, the same in every row

    @classmethod
    def empty(cls, model: ModelConfig, batch: int, slots: int, dtype: str) -> "Cache":
        """Returns a cache without tokens.

        Args:
          model: the sizes of layers and heads.
          batch: rows.
          slots: tokens a row that it has room for.
          dtype: the format of keys and values.
        """
        shape = (model.num_layers, batch, slots, model.num_kv_heads, model.d_head)
        segments_BS = jnp.zeros((batch, slots), jnp.int32)
        zeros = jnp.zeros(shape, dtype)
        return cls(zeros, zeros, segments_BS, jnp.zeros((), jnp.int32))


class Block(nnx.Module):
    """One layer: attention and feed-forward branches, with norms around them."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        lora: LoraConfig,
        key: jax.Array,
    ):
        attention_key, mlp_key = jax.random.split(key)
        norm = functools.partial(Norm, (model.d_model,), model, precision)
        pre = model.norm_order in ("pre", "both")
        post = model.norm_order in ("post", "both")
        self.attention_norm = norm() if pre else None
        self.attention = Attention(model, precision, lora, attention_key)
        self.attention_out_norm = norm() if post else None
        self.mlp_norm = norm() if pre else None
        self.mlp = Mlp(model, precision, lora, mlp_key)
        self.mlp_out_norm = norm() if post else None
        self.dropout = model.dropout

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        local: bool | Bool[Array, ""],
        cache: tuple[Array, ...] | None,
        keys_B2: Key[Array, "B 2"] | None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Returns the layer's output and its auxiliary results.

        Args:
          x_BTD: the residual stream.
          positions_BT: position of each token in its document.
          segments_BT: document of each token; equal ids see each other.
          local: whether the layer looks through the sliding window.
          cache: see `Attention`; with one, its keys and values are in the results.
          keys_B2: random keys of both branches; None runs without dropout.
        """
        x_BTD = checkpoint_name(x_BTD, "residual")
        key_one, key_two = (None, None) if keys_B2 is None else keys_B2.T
        with jax.named_scope("attention"):
            x_BTD, normed_BTD = _added(self.attention_norm, x_BTD, None)
            branch_BTD, kv = self.attention(
                normed_BTD, positions_BT, segments_BT, local, cache
            )
            branch_BTD = _normed(self.attention_out_norm, branch_BTD)
            branch_BTD = dropout(branch_BTD, key_one, self.dropout)
        with jax.named_scope("mlp"):
            x_BTD, normed_BTD = _added(self.mlp_norm, x_BTD, branch_BTD)
            branch_BTD = _normed(self.mlp_out_norm, self.mlp(normed_BTD))
            x_BTD += dropout(branch_BTD, key_two, self.dropout)
        return constrain(x_BTD, "batch", "tokens", "residual"), Aux(kv)


def _added(
    norm: Norm | None,
    x_BTD: Float[Array, "B T D"],
    branch_BTD: Float[Array, "B T D"] | None,
) -> tuple[Float[Array, "B T D"], Float[Array, "B T D"]]:
    """Returns the residual stream plus a branch, and the input of the next branch."""
    if norm is not None:
        return norm.added(x_BTD, branch_BTD)
    if branch_BTD is not None:
        x_BTD += branch_BTD
    return x_BTD, x_BTD


def _normed(norm: Norm | None, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    return x_BTD if norm is None else norm(x_BTD)


class Decoder(nnx.Module):
    """The decoder: token ids to next-token logits."""

    def __init__(
        self,
        model: ModelConfig,
        precision: PrecisionConfig,
        key: jax.Array,
        lora: LoraConfig = LoraConfig(),  # noqa: B008 (frozen)
    ):
        embed_key, blocks_key, head_key = jax.random.split(key, 3)
        V, D = model.vocab_size, model.d_model
        dtype = precision.params
        self.embedding = param(
            embed_key, (V, D), "vocab", "embed", std=0.02, dtype=dtype
        )
        self.positions = (
            param(
                jax.random.fold_in(embed_key, 1),
                (model.max_positions, D),
                "positions",
                "embed",
                std=0.02,
                dtype=dtype,
            )
            if model.positions == "learned"
            else None
        )
        self.blocks = stack.stacked(
            functools.partial(Block, model, precision, lora),
            jax.random.split(blocks_key, model.num_layers),
        )
        self.norm = Norm((D,), model, precision)
        self.head = (
            Linear(
                head_key,
                HEAD,
                model,
                std=D**-0.5,
                precision=precision,
                lora=lora,
            )
            if model.head == "untied"
            else None
        )
        self.model, self.precision = model, precision

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        dropout_B: Key[Array, " B"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Returns logits in `precision.reduce`.

        Args:
          tokens_BT: token ids.
          positions_BT: position of each token in its document.
          segments_BT: document of each token; equal ids see each other.
          dropout_B: a key for each sequence; None runs without dropout.
        """
        x_BTD, _ = self.features(tokens_BT, positions_BT, segments_BT, dropout_B)
        return self._logits(x_BTD)

    def features(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        dropout_B: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Returns the head's input and the layers' auxiliary results.

        Args:
          tokens_BT: token ids.
          positions_BT: position of each token in its document.
          segments_BT: document of each token; equal ids see each other.
          dropout_B: a key for each sequence; None runs without dropout.
        """
        x_BTD = self._embed(tokens_BT, positions_BT)
        x_BTD, aux = self._layers(x_BTD, positions_BT, segments_BT, None, dropout_B)
        with jax.named_scope("head"):
            return self.norm(x_BTD), aux

    @property
    def output(self) -> Float[Array, "..."]:
        """The head's matrix: [D, V], or [V, D] where it is the embedding."""
        return self.embedding[...] if self.head is None else self.head.weight[...]

    def decode(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: Cache,
    ) -> tuple[Float[Array, "B V"], Cache]:
        """Returns the logits after the last token and the cache with T more slots.

        Args:
          tokens_BT: token ids that the cache does not have.
          positions_BT: position of each token in its document.
          segments_BT: document of each token; 0 = no token.
          cache: keys and values of the tokens before.
        """
        start = cache.length
        segments_BS = jax.lax.dynamic_update_slice_in_dim(
            cache.segments_BS, segments_BT, start, 1
        )
        cache = dataclasses.replace(cache, segments_BS=segments_BS)
        x_BTD = self._embed(tokens_BT, positions_BT)
        x_BTD, aux = self._layers(x_BTD, positions_BT, segments_BT, cache, None)
        logits_BTV = self._logits(self.norm(x_BTD[:, -1:]))
        length = start + tokens_BT.shape[1]
        k_LBSKH, v_LBSKH = cast(tuple[Array, Array], aux.kv)
        return logits_BTV[:, 0], Cache(k_LBSKH, v_LBSKH, segments_BS, length)

    @jax.named_scope("embedding")
    def _embed(
        self, tokens_BT: Int[Array, "B T"], positions_BT: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        x_BTD = look_up(self.embedding[...], tokens_BT, "vocab", self.precision)
        if self.model.embed_scale != 1:
            x_BTD *= self.model.embed_scale
        if self.positions is not None:
            table = self.positions[...]
            x_BTD += look_up(table, positions_BT, "positions", self.precision)
        return constrain(x_BTD, "batch", "tokens", "residual")

    def _logits(self, x_BTD: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        p, cap = self.precision, self.model.logit_soft_cap
        with jax.named_scope("head"):
            letters = "btd,vd->btv" if self.head is None else "btd,dv->btv"
            logits_BTV = project(letters, x_BTD, self.output, p).astype(p.reduce)
            if cap:
                logits_BTV = cap * jnp.tanh(logits_BTV / cap)
            return constrain(logits_BTV, "batch", "tokens", "vocab")

    def _layers(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"],
        cache: Cache | None,
        dropout_B: Key[Array, " B"] | None,
    ) -> tuple[Float[Array, "B T D"], Aux]:
        """Returns the last layer's output and every layer's auxiliary results."""
        model = self.model
        graphdef, params = nnx.split(self.blocks)

        def layer(x_BTD, inputs):
            params, kv, index = inputs
            if cache is not None:
                kv = (*kv, cache.segments_BS, cache.length)
            local: bool | Bool[Array, ""] = model.is_local(index)
            keys_B2 = None
            if dropout_B is not None and model.dropout:
                fold = jax.vmap(lambda key: jax.random.fold_in(key, index))
                keys_B2 = jax.vmap(jax.random.split)(fold(dropout_B))
            block = nnx.merge(graphdef, params)
            return block(x_BTD, positions_BT, segments_BT, local, kv, keys_B2)

        kv = None if cache is None else (cache.k_LBSKH, cache.v_LBSKH)
        inputs = (params, kv, jnp.arange(model.num_layers))
        walk = stack.WALKS[model.layers]
        return walk(stack.rematerialised(model, layer), x_BTD, inputs)
