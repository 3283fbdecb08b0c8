"""Text from a checkpoint: decoding token by token with a key/value cache."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from scaletrain import config, mesh
from scaletrain.checkpoint import warm_start
from scaletrain.config import RunConfig
from scaletrain.data import Tokenizer
from scaletrain.errors import ConfigError, DataError
from scaletrain.hf import safetensors
from scaletrain.models import Cache
from scaletrain.program import Program, build
from scaletrain.workdir import Workdir


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The settings with which tokens are drawn from the logits."""

    temperature: float = 0.8  # 0 = always the likeliest
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that hold this probability; 1 = all
    max_new_tokens: int = 128

    def problems(self) -> list[str]:
        """Returns the errors in these settings, as `setting=value; why; what to do`."""
        problems = []
        if not 0 <= self.temperature < math.inf:
            problems.append(
                f"--temperature={self.temperature}; below 0 or not finite; "
                "give 0 or more."
            )
        if self.top_k < 0:
            problems.append(
                f"--top_k={self.top_k}; below 0; give 1 or more, 0 for all."
            )
        if not 0 < self.top_p <= 1:
            problems.append(f"--top_p={self.top_p}; outside (0, 1]; give 1 for all.")
        if self.max_new_tokens < 1:
            problems.append(
                f"--max_new_tokens={self.max_new_tokens}; below 1; give 1 or more."
            )
        if self.temperature == 0:
            problems += [
                f"--{name}={value}; no effect with --temperature=0; leave it out."
                for name, value, off in (
                    ("top_k", self.top_k, 0), ("top_p", self.top_p, 1.0),
                )
                if value != off
            ]  # fmt: skip
        return problems


def generate(
    program: Program,
    weights: Any,
    prompts: Sequence[Sequence[int]],
    *,
    sampling: Sampling,
    ends: Sequence[int],
    seed: int,
) -> list[list[int]]:
    """Returns the new tokens of each prompt, up to and without the first of `ends`.

    Prompts of different lengths share a batch: shorter ones are padded on the left with
    masked slots, so that a new token has the same slot in every row.

    Args:
      program: with the settings and the mesh.
      weights: of the model, sharded like the program's.
      prompts: token ids; an empty prompt starts a new document.
      sampling: the settings of the draws.
      ends: the ids that end a text, first the one between documents.
      seed: of the draws.
    """
    prompts = [list(p) or [ends[0]] for p in prompts]
    shards = program.run.batch_shards
    B = -(-len(prompts) // shards) * shards
    # A multiple of 64 lets prompts of similar lengths share a compilation.
    T = -(-max(map(len, prompts)) // 64) * 64
    tokens_BT = np.zeros((B, T), np.int32)
    segments_BT = np.zeros((B, T), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, T - len(prompt) :] = prompt
        segments_BT[row, T - len(prompt) :] = 1
    positions_BT = np.maximum(np.cumsum(segments_BT, axis=1) - 1, 0).astype(np.int32)
    unused_B = np.arange(B) >= len(prompts)
    out_BN = _jitted(program, sampling, tuple(ends))(
        weights, tokens_BT, positions_BT, segments_BT, unused_B, jax.random.key(seed)
    )
    rows = np.asarray(jax.device_get(out_BN)).tolist()[: len(prompts)]
    return [
        list(itertools.takewhile(lambda token: token not in ends, row)) for row in rows
    ]


@functools.lru_cache(maxsize=8)
def _jitted(program: Program, sampling: Sampling, ends: tuple[int, ...]) -> Any:
    """Returns the jitted decoding loop; the cache spares equal calls a compilation."""
    return jax.jit(
        functools.partial(_decode, program=program, sampling=sampling, ends=ends)
    )


def generate_texts(
    run: RunConfig,
    workdir: str,
    step: int | None,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    seed: int,
) -> list[dict[str, Any]]:
    """Returns a record for each prompt, with its continuation under a checkpoint.

    A record has `prompt`, the new `ids` and, if the run has a tokenizer, their `text`.

    Args:
      run: the settings.
      workdir: the folder of a run or an import.
      step: the checkpoint; None for the newest.
      prompts: texts or token ids.
      sampling: the settings of the draws.
      seed: of the draws, 0 to 2**32 - 1.

    Raises:
      ScaletrainError: no such checkpoint, no tokenizer, or settings out of range.
    """
    problems = sampling.problems()
    if not 0 <= seed < 2**32:
        problems.append(
            f"--seed={seed}; outside 0 to {2**32 - 1}; give a number in it."
        )
    if problems:
        raise ConfigError(problems)
    run = config.resolve(run.for_evaluation, jax.device_count())
    devices = mesh.build(run.mesh)
    program = build(run, devices)
    tokenizer = warm_start.tokenizer_of(workdir, run)
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise DataError(
            f"--workdir={workdir}; it has no tokenizer; give --prompt_ids, or the "
            "workdir of a run that was started on text."
        )
    ends = _ends(Workdir.of(workdir), tokenizer)
    ids = [
        tokenizer.prompt(prompt)
        if tokenizer and isinstance(prompt, str)
        else list(map(int, prompt))
        for prompt in prompts
    ]
    if problems := list(_prompt_problems(prompts, ids, run, sampling.max_new_tokens)):
        raise ConfigError(problems)
    with jax.set_mesh(devices):
        _, weights = warm_start.weights_of(workdir, run, step, program.state)
        new = generate(program, weights, ids, sampling=sampling, ends=ends, seed=seed)
    records = [
        {"prompt": prompt, "ids": row} for prompt, row in zip(prompts, new, strict=True)
    ]
    if tokenizer is not None:
        for record, prompt_ids in zip(records, ids, strict=True):
            # The ids of an empty prompt are no text: the continuation starts the text.
            record["text"] = _continuation(
                tokenizer, prompt_ids if record["prompt"] else [], record["ids"]
            )
    return records


def _ends(workdir: Workdir, tokenizer: Tokenizer | None) -> list[int]:
    """Returns the ids that end a text, the tokenizer's own first.

    A published checkpoint may name more: the end of a document and the end of a turn.
    Without any, -1, which is no token's id.
    """
    path = workdir.tokenizer / "generation_config.json"
    named = (
        safetensors.json_object(path).get("eos_token_id") if path.is_file() else None
    )
    named = named if isinstance(named, list) else [named]
    own = [] if tokenizer is None else [tokenizer.end_id]
    return [*own, *(i for i in named if type(i) is int)] or [-1]


def _continuation(
    tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]
) -> str:
    """Returns the text that `new` adds to that of `before`.

    Many decoders leave out the space that opens a text, so `new` is not decoded alone
    unless it completes a character of which `before` has the first bytes.
    """
    start, text = tokenizer.decode(before), tokenizer.decode([*before, *new])
    return text[len(start) :] if text.startswith(start) else tokenizer.decode(new)


def _prompt_problems(
    prompts: Sequence[Any], ids: Sequence[Sequence[int]], run: RunConfig, new: int
) -> Iterator[str]:
    """Yields the errors in prompts: ids or positions that the model does not have.

    Args:
      prompts: as the user gave them.
      ids: of the prompts.
      run: the settings.
      new: the most tokens of an answer.
    """
    for prompt, row in zip(prompts, ids, strict=True):
        given = f"--prompt_ids={','.join(map(str, row))}"
        if isinstance(prompt, str):
            given = f"--prompt={prompt}"
        if not row or min(row) < 0 or max(row) >= run.model.vocab_size:
            yield (
                f"{given}; not ids of this model; "
                f"give numbers from 0 to {run.model.vocab_size - 1}."
            )
    most, longest = run.model.max_positions, max(map(len, ids))
    if run.model.positions == "learned" and longest + new > most:
        remedy = f"give {most - longest} or fewer" if longest < most else "shorten it"
        yield (
            f"--max_new_tokens={new}; with a prompt of {longest} tokens more than "
            f"the {most} positions of this model (model.max_positions); {remedy}."
        )


def in_words(record: dict[str, Any]) -> str:
    """Returns a prompt with its continuation, as text if both are, else as ids."""
    prompt, new = record["prompt"], record.get("text", record["ids"])
    if isinstance(prompt, str):
        return prompt + new
    return ",".join(map(str, (*prompt, *record["ids"])))


class _DecodeState(NamedTuple):
    """The carry of the decoding loop."""

    new: Int[Array, ""]  # tokens drawn so far
    out_BN: Int[Array, "B N"]
    token_B1: Int[Array, "B 1"]
    position_B1: Int[Array, "B 1"]
    done_B: Array
    cache: Cache


def _decode(
    weights: Any,
    tokens_BT: Int[Array, "B T"],
    positions_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    unused_B: Array,
    key: jax.Array,
    *,
    program: Program,
    sampling: Sampling,
    ends: tuple[int, ...],
) -> Int[Array, "B N"]:
    """Returns the drawn tokens; a row that has ended is filled with `ends[0]`.

    Args:
      weights: of the model.
      tokens_BT: prompts, padded on the left.
      positions_BT: of the tokens in their prompts.
      segments_BT: 1 for tokens, 0 for padding.
      unused_B: True for rows that only fill the batch.
      key: of the draws.
      program: with the settings.
      sampling: the settings of the draws.
      ends: the ids that end a row.
    """
    run, model = program.run, nnx.merge(program.eval_graphdef, weights)
    B, T = tokens_BT.shape
    N = sampling.max_new_tokens
    cache = Cache.empty(run.model, B, T + N, run.precision.compute)
    logits_BV, cache = model.decode(tokens_BT, positions_BT, segments_BT, cache)
    ones_B1 = jnp.ones((B, 1), jnp.int32)

    def draw(state: _DecodeState, logits_BV: Float[Array, "B V"]) -> _DecodeState:
        token_B = sample(logits_BV, jax.random.fold_in(key, state.new), sampling)
        token_B = jnp.where(state.done_B, ends[0], token_B)
        out_BN = jax.lax.dynamic_update_slice_in_dim(
            state.out_BN, token_B[:, None], state.new, 1
        )
        return state._replace(
            new=state.new + 1,
            out_BN=out_BN,
            token_B1=token_B[:, None],
            position_B1=state.position_B1 + 1,
            done_B=state.done_B | jnp.isin(token_B, jnp.array(ends)),
        )

    def body(state: _DecodeState) -> _DecodeState:
        logits_BV, cache = model.decode(
            state.token_B1, state.position_B1, ones_B1, state.cache
        )
        return draw(state._replace(cache=cache), logits_BV)

    first = _DecodeState(
        new=jnp.zeros((), jnp.int32),
        out_BN=jnp.full((B, N), ends[0], jnp.int32),
        token_B1=ones_B1,
        position_B1=positions_BT[:, -1:],
        done_B=unused_B,
        cache=cache,
    )
    state = draw(first, logits_BV)
    state = jax.lax.while_loop(
        lambda state: (state.new < N) & ~jnp.all(state.done_B), body, state
    )
    return state.out_BN


def sample(
    logits_BV: Float[Array, "B V"], key: jax.Array, sampling: Sampling
) -> Int[Array, " B"]:
    """Returns one token per row.

    Top-p keeps the token with which the sum reaches `sampling.top_p`. Among equally
    likely tokens the one with the smaller id comes first.

    Args:
      logits_BV: of the next token.
      key: of the draw.
      sampling: its settings.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BV = logits_BV.astype(jnp.float32) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        order_BV = jnp.argsort(logits_BV, axis=-1, descending=True, stable=True)
        sorted_BV = jnp.take_along_axis(logits_BV, order_BV, axis=-1)
        if sampling.top_k:
            ranks_1V = jnp.arange(logits_BV.shape[-1])[None]
            sorted_BV = jnp.where(ranks_1V < sampling.top_k, sorted_BV, -jnp.inf)
        if sampling.top_p < 1:
            shares_BV = jax.nn.softmax(sorted_BV, axis=-1)
            before_BV = jnp.cumsum(shares_BV, axis=-1) - shares_BV
            sorted_BV = jnp.where(before_BV < sampling.top_p, sorted_BV, -jnp.inf)
        logits_BV = jnp.put_along_axis(
            logits_BV, order_BV, sorted_BV, axis=-1, inplace=False
        )
    return jax.random.categorical(key, logits_BV).astype(jnp.int32)
