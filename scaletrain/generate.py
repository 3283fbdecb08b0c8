"""Text from a checkpoint: a key/value cache, filled once, extended token by token."""

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
    """How the next token is drawn from the logits."""

    temperature: float = 0.8  # 0 = always the likeliest
    top_k: int = 0  # only the k likeliest; 0 = all
    top_p: float = 1.0  # only the likeliest that hold this probability; 1 = all
    max_new_tokens: int = 128

    def problems(self) -> list[str]:
        """Returns what cannot be honoured, as `setting=value; why; what to do`."""
        found = []
        if not 0 <= self.temperature < math.inf:
            found.append(
                f"--temperature={self.temperature}; below 0 or not finite; "
                "give 0 or more."
            )
        if self.top_k < 0:
            found.append(f"--top_k={self.top_k}; below 0; give 1 or more, 0 for all.")
        if not 0 < self.top_p <= 1:
            found.append(f"--top_p={self.top_p}; outside (0, 1]; give 1 for all.")
        if self.max_new_tokens < 1:
            found.append(
                f"--max_new_tokens={self.max_new_tokens}; below 1; give 1 or more."
            )
        if self.temperature == 0:
            found += [
                f"--{name}={value}; no effect with --temperature=0; leave it out."
                for name, value, off in (
                    ("top_k", self.top_k, 0), ("top_p", self.top_p, 1.0),
                )
                if value != off
            ]  # fmt: skip
        return found


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

    Prompts of different lengths share a batch: the shorter ones are padded on the
    left with slots that nobody sees, so that every row writes the same slot.

    Args:
      prompts: token ids; an empty one starts a new document.
      ends: the ids that end a text, first the one that stands between documents.
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
    return jax.jit(
        functools.partial(_decode, program=program, sampling=sampling, ends=ends)
    )


def run(
    run: RunConfig,
    workdir: str,
    at: int | None,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    seed: int,
) -> list[dict[str, Any]]:
    """Returns what follows each prompt under the checkpoint of step `at`.

    A prompt is a text or ids. Of each: `prompt`, the new `ids` and, if the run has a
    tokenizer, their `text`.

    Raises:
      ScaletrainError: no such checkpoint, no tokenizer, or senseless sampling.
    """
    found = sampling.problems()
    if not 0 <= seed < 2**32:
        found.append(f"--seed={seed}; outside 0 to {2**32 - 1}; give a number in it.")
    if found:
        raise ConfigError(found)
    run = config.resolve(run.for_evaluation, jax.device_count())
    grid = mesh.build(run.mesh)
    program = build(run, grid)
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
    if problems := list(_problems(prompts, ids, run, sampling.max_new_tokens)):
        raise ConfigError(problems)
    with jax.set_mesh(grid):
        _, weights = warm_start.weights_of(workdir, run, at, program.state)
        new = generate(program, weights, ids, sampling=sampling, ends=ends, seed=seed)
    found = [
        {"prompt": prompt, "ids": row} for prompt, row in zip(prompts, new, strict=True)
    ]
    if tokenizer is not None:
        for record, before in zip(found, ids, strict=True):
            # Behind an empty prompt the text begins: nothing stands before it.
            record["text"] = _continuation(
                tokenizer, before if record["prompt"] else [], record["ids"]
            )
    return found


def _ends(workdir: Workdir, tokenizer: Tokenizer | None) -> list[int]:
    """Returns the ids that end a text, the tokenizer's own first; -1 where none does.

    A published checkpoint may name more: the end of a document and that of a turn.
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


def _problems(
    prompts: Sequence[Any], ids: Sequence[Sequence[int]], run: RunConfig, new: int
) -> Iterator[str]:
    """Yields what the model cannot be asked: ids or positions that it does not have."""
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


def in_words(found: dict[str, Any]) -> str:
    """Returns a prompt with what follows it, as text where both are."""
    prompt, new = found["prompt"], found.get("text", found["ids"])
    if isinstance(prompt, str):
        return prompt + new
    return ",".join(map(str, (*prompt, *found["ids"])))


class _Loop(NamedTuple):
    """What the decoding loop carries."""

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
    """Returns the drawn tokens; rows are filled with an end once they end."""
    run, model = program.run, nnx.merge(program.eval_graphdef, weights)
    B, T = tokens_BT.shape
    N = sampling.max_new_tokens
    cache = Cache.empty(run.model, B, T + N, run.precision.compute)
    logits_BV, cache = model.decode(tokens_BT, positions_BT, segments_BT, cache)
    ones_B1 = jnp.ones((B, 1), jnp.int32)

    def draw(loop: _Loop, logits_BV: Float[Array, "B V"]) -> _Loop:
        token_B = sample(logits_BV, jax.random.fold_in(key, loop.new), sampling)
        token_B = jnp.where(loop.done_B, ends[0], token_B)
        out_BN = jax.lax.dynamic_update_slice_in_dim(
            loop.out_BN, token_B[:, None], loop.new, 1
        )
        return loop._replace(
            new=loop.new + 1,
            out_BN=out_BN,
            token_B1=token_B[:, None],
            position_B1=loop.position_B1 + 1,
            done_B=loop.done_B | jnp.isin(token_B, jnp.array(ends)),
        )

    def body(loop: _Loop) -> _Loop:
        logits_BV, cache = model.decode(
            loop.token_B1, loop.position_B1, ones_B1, loop.cache
        )
        return draw(loop._replace(cache=cache), logits_BV)

    first = _Loop(
        new=jnp.zeros((), jnp.int32),
        out_BN=jnp.full((B, N), ends[0], jnp.int32),
        token_B1=ones_B1,
        position_B1=positions_BT[:, -1:],
        done_B=unused_B,
        cache=cache,
    )
    loop = draw(first, logits_BV)
    loop = jax.lax.while_loop(
        lambda loop: (loop.new < N) & ~jnp.all(loop.done_B), body, loop
    )
    return loop.out_BN


def sample(
    logits_BV: Float[Array, "B V"], key: jax.Array, sampling: Sampling
) -> Int[Array, " B"]:
    """Returns one token a row. Top-p keeps the token that crosses the mark.

    Of equally likely tokens the one of the smaller id counts as the likelier.
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
