"""The rules between settings; all problems are reported at once.

Each rule yields problems: `setting=value; why not; what to do`. A setting that would
have no effect is a problem too: whoever set it expects something to happen.
"""

import dataclasses
import math
from collections.abc import Iterator

from scaletrain import paths
from scaletrain.config.attention import unable
from scaletrain.config.schema import (
    AXES,
    FIELDS,
    AxesConfig,
    MeshConfig,
    RunConfig,
)
from scaletrain.config.setting import Condition, get, leaves
from scaletrain.errors import ConfigError, counted
from scaletrain.matrices import LAYER, REMAT_NAMES, named


def check(run: RunConfig) -> RunConfig:
    """Returns `run`, or raises ConfigError with every problem it has."""
    if unmet := problems(run):
        raise ConfigError(unmet)
    return run


def problems(run: RunConfig) -> list[str]:
    """Returns every problem that does not depend on the number of devices."""
    out_of_range = list(_values(run))
    if out_of_range:  # the rules below divide by these values
        return out_of_range + list(_unused(run))
    rules = (
        _model,
        _attention,
        _precision,
        _lora,
        _batch,
        _layout,
        _optim,
        _data,
        _cadence,
        _unused,
    )
    return [problem for rule in rules for problem in rule(run)]


def _values(run: RunConfig) -> Iterator[str]:
    """Yields every value outside its own choices or range."""
    for path, field, value in leaves(run):
        choices = field.metadata["choices"]
        least, most = field.metadata["least"], field.metadata["most"]
        if choices and value not in choices:
            yield f"{path}={value!r}; unknown; pick one of {', '.join(choices)}."
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{path}={value}; not finite; give a finite number."
        elif least is not None and value < least:
            yield f"{path}={value}; below {least}; give {least} or more."
        elif most is not None and value > most:
            yield f"{path}={value}; above {most}; give {most} or less."
        if (kind := field.metadata["path"]) and isinstance(value, str):
            yield from paths.problems(path, value, local=kind == "local")
        if field.name in AXES and value == 0:
            yield f"{path}=0; an axis has one device or more; give 1, or -1 for all."


def _model(run: RunConfig) -> Iterator[str]:
    m = run.model
    if m.num_heads % m.num_kv_heads:
        yield (
            f"model.num_kv_heads={m.num_kv_heads}; does not divide "
            f"model.num_heads={m.num_heads}; pick a divisor."
        )
    if m.d_head % 2:
        yield f"model.d_head={m.d_head}; odd; rotary positions need an even size."
    for path in ("remat_save", "remat_offload"):
        for name in getattr(m, path):
            if name not in REMAT_NAMES:
                yield (
                    f"model.{path}={name}; no value has that name; "
                    f"pick from {', '.join(REMAT_NAMES)}."
                )
    for name in set(m.remat_save) & set(m.remat_offload):
        yield f"model.remat_offload={name}; model.remat_save has it too; name it once."
    if m.remat == "save" and not m.remat_save + m.remat_offload:
        yield (
            "model.remat=save; model.remat_save names nothing to save; "
            "name values in model.remat_save, or set model.remat=full."
        )
    if m.positions == "learned" and m.max_positions < run.seq_len:
        yield (
            f"model.max_positions={m.max_positions}; learned positions for fewer "
            f"tokens than seq_len={run.seq_len}; set it to seq_len or more."
        )
    if m.rope.scaling == "llama3" and m.rope.low_freq >= m.rope.high_freq:
        yield (
            f"model.rope.low_freq={m.rope.low_freq}; not below model.rope.high_freq="
            f"{m.rope.high_freq}; lower it."
        )


def _attention(run: RunConfig) -> Iterator[str]:
    for why, change in unable(run, run.model.attention):
        yield f"model.attention={run.model.attention}; {why}; {change}, or use xla."


def _targets(path: str, targets: tuple[str, ...]) -> Iterator[str]:
    """Yields a problem for each pattern that matches no matrix."""
    for target in targets:
        if not named((target,)):
            yield (
                f"{path}={target}; no matrix has that name; "
                f"pick from {', '.join(LAYER)}, with * and ? for parts."
            )


def _precision(run: RunConfig) -> Iterator[str]:
    p = run.precision
    if p.matmul == "compute":
        return
    yield from _targets("precision.targets", p.targets)
    if not p.targets:
        yield (
            f"precision.targets=(); nothing would be multiplied in precision.matmul="
            f"{p.matmul}; name matrices, or set precision.matmul=compute."
        )


def _lora(run: RunConfig) -> Iterator[str]:
    lora = run.lora
    if lora.rank == 0:
        return
    yield from _targets("lora.targets", lora.targets)
    if not lora.targets:
        yield "lora.targets=(); nothing would be trained; name matrices."
    if lora.alpha == 0:
        yield "lora.alpha=0; the adapters would have no effect; give a positive number."
    if not run.init_from:
        yield (
            f"lora.rank={lora.rank}; adapters need weights to adapt; "
            "set init_from to the workdir of an import or of a run."
        )


def _batch(run: RunConfig) -> Iterator[str]:
    if run.batch_size % run.accumulate_steps:
        yield (
            f"accumulate_steps={run.accumulate_steps}; does not divide "
            f"batch_size={run.batch_size}; pick a divisor."
        )
    if run.optim.accumulate == "multi_steps" and run.accumulate_steps == 1:
        yield (
            "optim.accumulate=multi_steps; no effect with accumulate_steps=1; "
            "set accumulate_steps to 2 or more, or optim.accumulate=microbatch."
        )


def _layout(run: RunConfig) -> Iterator[str]:
    """Yields the problems of the mesh, whose axes may still be -1."""
    mesh = run.mesh
    free = [path for path, _, size in leaves(mesh) if size == -1]
    if len(free) > 1:
        yield f"mesh.{free[0]}=-1; mesh.{free[1]} is -1 too; leave one axis free."
    sizes = {axis: mesh.size(axis) for axis in AXES}
    if sizes["expert"] != 1:
        yield (
            f"mesh.expert={mesh.expert}; the model has no experts; "
            "set mesh.expert and mesh.dcn.expert to 1."
        )
    if sizes["stage"] != 1:
        yield (
            f"mesh.stage={mesh.stage}; layers cannot be split over stages; "
            "set mesh.stage and mesh.dcn.stage to 1 and use mesh.fsdp."
        )
    # (axis, setting, what it splits): an axis of -1 is looked at again when resolved.
    splits = (
        ("fsdp", "model.d_model"),
        ("tensor", "model.num_heads"),
        ("tensor", "model.num_kv_heads"),
        ("tensor", "model.d_ff"),
        ("tensor", "model.vocab_size"),
        ("context", "seq_len"),
    )
    for axis, path in splits:
        size, dim = sizes[axis], get(run, path)
        if size > 1 and dim % size:
            near = _nearest(size, [get(run, p) for a, p in splits if a == axis])
            yield (
                f"mesh.{axis}={size}; does not divide {path}={dim}; "
                f"the nearest that can is {near}."
            )
    shards, rows = run.batch_shards, run.micro_batch_rows
    if sizes["data"] > 0 and sizes["fsdp"] > 0 and rows % shards:
        fewer = math.gcd(run.batch_size // shards, run.accumulate_steps)
        # optim.accumulate=multi_steps needs two micro-batches or more.
        helps = run.batch_size % shards == 0
        helps &= fewer > 1 or run.optim.accumulate != "multi_steps"
        other = f", or set accumulate_steps={fewer}" if helps else ""
        yield (
            f"batch_size={run.batch_size}; {rows} sequences at a time "
            f"(accumulate_steps={run.accumulate_steps}) do not divide over "
            f"mesh.data x mesh.fsdp = {shards}; make batch_size a multiple of "
            f"{run.accumulate_steps * shards}{other}."
        )


def _nearest(size: int, dims: list[int]) -> int:
    """Returns the number nearest to `size` that divides all of `dims`."""
    most = math.gcd(*dims)
    return min(
        (d for d in range(1, most + 1) if most % d == 0), key=lambda d: abs(d - size)
    )


def resolve(run: RunConfig, num_devices: int, where: str = "here") -> RunConfig:
    """Returns `run` with the free mesh axis filled from the number of devices.

    Args:
      run: the settings.
      num_devices: of all processes together.
      where: place of the devices, for the message.

    Raises:
      ConfigError: the axes do not multiply to `num_devices`, or a size that follows
        from them does not divide what it splits.
    """
    mesh = run.mesh
    sizes = [get(part, name) for part in (mesh, mesh.dcn) for name in AXES]
    fixed = math.prod(size for size in sizes if size != -1)
    spelled = ", ".join(f"{n}={s}" for n in AXES if (s := mesh.size(n)) != 1)
    rest, remainder = divmod(num_devices, fixed)
    if remainder or (-1 not in sizes and rest != 1):
        are = "is" if num_devices == 1 else "are"
        raise ConfigError(
            [
                f"mesh=({spelled or 'one device'}); "
                f"{counted(num_devices, 'device')} {are} {where}; "
                f"{_nearest_mesh(mesh, num_devices)} set one axis to -1."
            ]
        )

    def fill(axes: AxesConfig) -> dict[str, int]:
        return {n: rest for n in AXES if get(axes, n) == -1}

    dcn = dataclasses.replace(mesh.dcn, **fill(mesh.dcn))
    mesh = dataclasses.replace(mesh, dcn=dcn, **fill(mesh))
    return check(dataclasses.replace(run, mesh=mesh))


def is_possible(run: RunConfig, num_devices: int) -> bool:
    """Returns whether `resolve` accepts `run`."""
    try:
        resolve(run, num_devices)
    except ConfigError:
        return False
    return True


def _nearest_mesh(mesh: MeshConfig, num_devices: int) -> str:
    """Returns advice: the size of the largest axis with which the mesh fits."""
    axes = [axis for axis in AXES if axis not in ("expert", "stage")]  # these stay 1
    name = max(axes, key=lambda axis: get(mesh, axis))
    product = mesh.num_devices
    others = (product or 1) // max(1, get(mesh, name))
    if product is None or num_devices % others:
        return "make the axes multiply to that number, or"
    return f"set mesh.{name}={num_devices // others}, or"


def _optim(run: RunConfig) -> Iterator[str]:
    o = run.optim
    if o.learning_rate == 0:
        yield "optim.learning_rate=0; nothing would be learned; give a positive rate."
    if o.warmup_steps >= run.num_steps:
        yield (
            f"optim.warmup_steps={o.warmup_steps}; the run has num_steps="
            f"{run.num_steps}; warm up for fewer steps than the run has."
        )
    elif o.schedule == "wsd" and o.warmup_steps + o.decay_steps > run.num_steps:
        yield (
            f"optim.decay_steps={o.decay_steps}; with optim.warmup_steps="
            f"{o.warmup_steps} more than num_steps={run.num_steps}; shorten one."
        )
    for name in ("b1", "b2"):
        if get(o, name) == 1:
            yield f"optim.{name}=1; the average would never move; stay below 1."


def _data(run: RunConfig) -> Iterator[str]:
    d = run.data
    if d.source in ("files", "tfds") and not d.path:
        needed = "a file or glob" if d.source == "files" else "a data set's name"
        yield f"data.path=''; data.source={d.source} reads from it; give {needed}."
    if d.format == "chat" and d.source != "files":
        yield (
            f"data.source={d.source}; data.format=chat reads rows of .jsonl or "
            "parquet; set data.source=files, or data.format=text."
        )
    if d.format == "chat" and (
        d.tokenizer in ("bytes", "bpe") or d.tokenizer.endswith(".model")
    ):
        yield (
            f"data.tokenizer={d.tokenizer}; it has no chat template for "
            "data.format=chat; give the path of a tokenizer.json that lies beside "
            "its tokenizer_config.json."
        )
    smallest = {"bytes": 257, "bpe": 257}.get(d.tokenizer, 2)
    if d.source != "synthetic" and run.model.vocab_size < smallest:
        yield (
            f"model.vocab_size={run.model.vocab_size}; data.tokenizer={d.tokenizer} "
            f"has at least {smallest} tokens; set it to {smallest} or more."
        )


def _cadence(run: RunConfig) -> Iterator[str]:
    c = run.checkpoint
    if c.keep_every_steps and not c.every_steps:
        yield (
            f"checkpoint.keep_every_steps={c.keep_every_steps}; no effect with "
            "checkpoint.every_steps=0; set checkpoint.every_steps."
        )
    elif c.keep_every_steps and c.keep_every_steps % c.every_steps:
        yield (
            f"checkpoint.keep_every_steps={c.keep_every_steps}; not a multiple of "
            f"checkpoint.every_steps={c.every_steps}; make it one."
        )
    if run.data.source != "synthetic" and run.data.validation_fraction == 0:
        for path in ("eval_every_steps", "eval.num_batches"):
            if get(run, path):
                yield (
                    f"{path}={get(run, path)}; data.validation_fraction=0 leaves "
                    f"nothing to evaluate; set one of the two."
                )


def _unused(run: RunConfig) -> Iterator[str]:
    """Yields a problem for each setting off its default that nothing would read."""
    default = RunConfig()
    for path, field, value in leaves(run):
        if value != get(default, path):
            for condition in field.metadata["used_when"]:
                yield from _idle(run, path, condition)


def _idle(run: RunConfig, path: str, condition: Condition) -> Iterator[str]:
    """Yields the problem of a setting whose condition does not hold.

    Args:
      run: the settings.
      path: the setting.
      condition: under which it is read.
    """
    switch, values, negated = condition
    now, choices = get(run, switch), FIELDS[switch].metadata["choices"]
    if condition.holds(run) or (choices and now not in choices):
        return
    line = f"{path}={get(run, path)!r}; no effect with {switch}="
    leave = f"leave it at {get(RunConfig(), path)!r}"
    if not negated:
        yield f"{line}{now}; {leave}, or set {switch} to {' or '.join(values)}."
    elif isinstance(now, str):
        yield f"{line}{now}; {leave}."
    else:
        yield f"{line}{now:g}; set {switch}, or {leave}."
