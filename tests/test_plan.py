"""Plans: what can be asked, what the compiler says and how it is read."""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
import plans
import pytest
import small
from jax.experimental import topologies
from jax.sharding import NamedSharding

from scaletrain import (
    compilation,
    config,
    flops,
    hlo,
    main,
    mesh,
    sharding,
    step,
    train,
)
from scaletrain.commands.command import Result
from scaletrain.config import AxesConfig, MeshConfig, PrecisionConfig
from scaletrain.errors import ConfigError, PlanError
from scaletrain.hardware import chips, slices
from scaletrain.hardware.chip import Figure
from scaletrain.models import attention
from scaletrain.plan import (
    command,
    compile_worker,
    compiler,
    estimate,
    memory,
    record,
    report,
    schedule,
    search,
)
from scaletrain.plan.record import Wanted
from scaletrain.program import build

KEYS = {
    "fits", "hbm_peak_bytes", "hbm_limit_bytes", "hbm_by_class", "parameters",
    "flops_per_token", "step_time_s", "tokens_per_s_per_chip", "mfu", "mfu_palm",
    "communication", "hours", "cost_usd", "energy_kwh", "co2e_kg", "overrides",
    "topology", "num_chips",
}  # fmt: skip
WANTED = Wanted(spec="x.py")
RUN = small.changed(
    small.RUN,
    batch_size=8,
    seq_len=256,
    model__num_layers=3,
    model__d_model=256,
    model__d_head=64,
    model__d_ff=512,
    model__vocab_size=1024,
    model__attention="xla",
    precision__compute="bfloat16",
    mesh=MeshConfig(fsdp=4),
)


HLO = """\
HloModule jit_train_step, is_scheduled=true

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %p = (s32[]{:T(128)}, bf16[8,16]{1,0}) parameter(0)
  %kernel = bf16[4,64,32]{2,1,0} custom-call(%p#1), attributes={kernel_metadata={
    "a": 1
}}, metadata={op_name="splash"}
  ROOT %out = (s32[], bf16[8,16]{1,0}) tuple(%p#0, %p#1)
}, execution_thread="main"

%cond (p.1: (s32[], bf16[8,16])) -> pred[] {
  %p.1 = (s32[], bf16[8,16]{1,0}) parameter(0)
  %limit = s32[] constant(7)
  ROOT %lt = pred[] compare(%p.1#0, %limit), direction=LT
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0:T(8,128)S(1)} parameter(0)
  %loop = (s32[], bf16[8,16]{1,0}) while(%a), condition=%cond, body=%body
  ROOT %r = bf16[8,16]{1,0} copy(%loop#1)
}
"""


def test_a_program_is_read():
    module = hlo.parse(HLO)
    assert module.entry == "main"
    entry = module.computations["main"]
    assert entry.by_name["a"].shapes[0].space == 1
    assert module.trips(entry.by_name["loop"]) == 7
    body = module.computations["body"]
    assert [each.opcode for each in body.instructions] == [
        "parameter", "custom-call", "tuple",
    ]  # fmt: skip
    assert body.by_name["kernel"].op_name == "splash"


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=mesh['x'=4,'y'=2] {'x'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['x'=4,'y'=2] {'y'}", [0, 1]),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
    ],
)
def test_groups_are_read_in_every_spelling(text, wanted):
    each = hlo.Instruction("x", (), "all-gather", (), text, False)
    assert hlo.group(each, 8).tolist() == wanted


def test_a_product_takes_the_part_of_a_value_that_it_names():
    """As where one fusion rounds a matrix and its transpose to 8 bits."""
    lines = """\
ENTRY %main (a: bf16[8,16]) -> bf16[4,16] {
  %both = (f8e4m3fn[8,16]{1,0}, f8e4m3fn[16,8]{1,0}) fusion(%a), calls=%round
  %w = f8e4m3fn[4,8]{1,0} parameter(1)
  ROOT %r = bf16[4,16]{1,0} dot(%w, %both#1), lhs_contracting_dims={1}
}
"""
    main = hlo.parse(lines).computations["main"]
    assert hlo.flops(main.root, main) == 2 * 4 * 8 * 16
    turned = lines.replace("dot(%w, %both#1)", "dot(%both#1, %w)")
    main = hlo.parse(turned).computations["main"]
    assert hlo.flops(main.root, main) == 2 * 4 * 16 * 8


def test_padding_is_no_work():
    """Pairs of positions that meet, against counting them one by one."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        size, kernel, stride, spread, gap = rng.integers(1, 6, 5).tolist()
        pad, out = int(rng.integers(0, 6)), int(rng.integers(1, 9))
        wanted = sum(
            0 <= o * stride + k * gap - pad <= (size - 1) * spread
            and (o * stride + k * gap - pad) % spread == 0
            for o in range(out)
            for k in range(kernel)
        )
        assert hlo._meetings(size, kernel, out, stride, pad, spread, gap) == wanted


def test_names_of_asynchronous_operands_take_no_memory():
    """A TPU v7x has 22 GiB of them in a step of Llama 8B that holds 11."""
    report = "Memory Space: default (color=0)\nTotal bytes: 1700\n"
    assignment = (
        "allocation 1: size 600, page 0, thread-local:\n value: x\n"
        "allocation 2: size 50, color 1, page 0, thread-local:\n"
        "allocation 3: size 1000, page 0, preallocated-temp:\n"
        "allocation 4: size 100, page 0, parameter 0, shape |f32[25]| at ShapeIndex:\n"
    )
    module = hlo.parse(HLO)
    usage = memory.usage(report, assignment, module, {})
    assert (usage.total_bytes, usage.temporary_bytes) == (1100, 1000)
    known = {"parameters": 40, "optimizer": 50, "gradients": 40}
    assert memory.by_class(usage, known) == {
        "parameters": 40, "optimizer": 50, "gradients": 40,
        "activations_and_temporaries": 960, "other": 10,
    }  # fmt: skip


def test_a_buffer_of_no_origin_is_told_of_by_its_shape():
    """As sums of gradients are; whole or as a device holds it."""
    assignment = (
        "allocation 3: size 300, preallocated-temp:\n"
        " value: <1 fusion.7 @0> (size=200,offset=0): f32[16,8]{1,0}\n"
        " value: <2 fusion.8 @0> (size=100,offset=200): f32[5]{0}\n"
    )
    shapes = {"16,8": "blocks/mlp/down/weight"}
    usage = memory.usage("", assignment, hlo.parse(HLO), shapes)
    assert usage.largest == [
        (200, "f32[16,8] fusion.7, of the shape of blocks/mlp/down/weight"),
        (100, "f32[5] fusion.8"),
    ]
    run = config.resolve(config.check(RUN), 4)
    weights = build(run, mesh.build(run.mesh, jax.devices()[:4])).state.weights
    shapes = compile_worker.shapes(weights)
    rows, model = run.model.vocab_size, run.model
    assert "embedding" in shapes[f"{rows},{model.d_model}"]
    assert "embedding" in shapes[f"{rows},{model.d_model // 4}"]
    down = f"{model.num_layers},{model.d_ff},{model.d_model}"
    assert "blocks/mlp/down/weight" in shapes[down]


_SLICED = """HloModule sliced, is_scheduled=true

%copy_fusion.1 (p: bf16[80,8,128]) -> bf16[80,8,128] {
  %p = bf16[80,8,128]{2,1,0:T(16,128)} parameter(0)
  ROOT %copy = bf16[80,8,128]{2,1,0:T(8,128)} copy(%p)
}

%read (stack: bf16[80,8,128], i: s32[]) -> bf16[1,8,128] {
  %stack = bf16[80,8,128]{2,1,0:T(16,128)} parameter(0)
  %view = bf16[80,8,128]{2,1,0:T(8,128)} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion.1
  %i = s32[] parameter(1)
  ROOT %one = bf16[1,8,128]{2,1,0} dynamic-slice(%view, %i, %i, %i), dynamic_slice_sizes={1,8,128}
}

%write (stack: bf16[80,8,128], i: s32[], new: bf16[1,8,128]) -> bf16[80,8,128] {
  %stack = bf16[80,8,128]{2,1,0:T(16,128)} parameter(0)
  %view = bf16[80,8,128]{2,1,0:T(8,128)} fusion(%stack), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%copy_fusion.1
  %i = s32[] parameter(1)
  %new = bf16[1,8,128]{2,1,0} parameter(2)
  ROOT %all = bf16[80,8,128]{2,1,0:T(16,128)} dynamic-update-slice(%view, %new, %i, %i, %i)
}

%rounded (wide: f32[80,8,128]) -> bf16[1,8,128] {
  %wide = f32[80,8,128]{2,1,0} parameter(0)
  %low = bf16[80,8,128]{2,1,0} convert(%wide)
  ROOT %one = bf16[1,8,128]{2,1,0} slice(%low), slice={[3:4], [0:8], [0:128]}
}

ENTRY %main (stack: bf16[80,8,128], i: s32[], wide: f32[80,8,128]) -> bf16[80,8,128] {
  %stack = bf16[80,8,128]{2,1,0:T(16,128)} parameter(0)
  %i = s32[]{:S(6)} parameter(1)
  %wide = f32[80,8,128]{2,1,0} parameter(2)
  %low = bf16[1,8,128]{2,1,0} fusion(%wide), kind=kLoop, calls=%rounded
  %one = bf16[1,8,128]{2,1,0} fusion(%stack, %i), kind=kLoop, calls=%read
  ROOT %out = bf16[80,8,128]{2,1,0:T(16,128)} fusion(%stack, %i, %one), kind=kLoop, calls=%write
}
"""  # noqa: E501


def test_of_stacked_values_the_slice_is_moved():
    """Saved values of all layers are read and written a layer at a time."""
    chip = slices.parse("tpu7x:1x1x1")
    found = schedule.account(hlo.parse(_SLICED), {"fsdp": 1}, chip)
    layer = 2 * 8 * 128
    moved = found.seconds * chip.chip.memory_efficiency * chip.chip.hbm_bytes_per_s
    # Two read and write one; the third reads one twice as wide.
    assert moved == pytest.approx((2 * 2 + 3) * layer)


_GATHERED = """
HloModule step, is_scheduled=true, num_partitions=4

ENTRY %main (a: bf16[8,16], b: bf16[2,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %b = bf16[2,16]{1,0} parameter(1)
  %both = (bf16[32,16]{1,0}, bf16[8,16]{1,0}) all-gather(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  %start = ((bf16[8,16]{1,0}, bf16[2,16]{1,0}), (bf16[32,16]{1,0}, bf16[8,16]{1,0})) all-gather-start(%a, %b), replica_groups={{0,1,2,3}}, dimensions={0}
  %done = (bf16[32,16]{1,0}, bf16[8,16]{1,0}) all-gather-done(%start)
  %sent = (bf16[8,16]{1,0}, bf16[8,16]{1,0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}
  %there = bf16[8,16]{1,0} collective-permute-done(%sent)
  %sums = (bf16[8,16]{1,0}, bf16[2,16]{1,0}) all-reduce(%a, %b), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %out = bf16[8,16]{1,0} get-tuple-element(%done), index=1
}
"""  # noqa: E501


def test_collectives_of_several_arrays_count_each():
    axes = schedule.account(
        hlo.parse(_GATHERED), {"fsdp": 4}, slices.parse("h100:4")
    ).communication
    gathered, moved, summed = 2 * (32 + 8) * 16, 2 * 8 * 16, 2 * (8 + 2) * 16
    sent = 2 * gathered * 3 / 4 + moved + 2 * summed * 3 / 4
    assert axes["fsdp"]["bytes"] == sent
    assert axes["fsdp"]["count"] == 4


_FUSED = """
HloModule step, is_scheduled=true

ENTRY %main (x: bf16[128,64], w: bf16[64,512]) -> bf16[128,256] {
  %x = bf16[128,64]{1,0} parameter(0)
  %w = bf16[64,512]{1,0} parameter(1)
  %up = (bf16[128,256]{1,0}, bf16[128,256]{1,0}, bf16[128,256]{1,0}) custom-call(%x, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(train_step)/jvp(jit(layer))/mlp/matmul/mpmd_map"}
  %down = bf16[128,512]{1,0} custom-call(%x, %w), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(train_step)/attention/mpmd_map"}
  ROOT %out = bf16[128,256]{1,0} get-tuple-element(%up), index=2
}
"""  # noqa: E501


def test_a_matmul_with_an_epilogue_has_the_flops_of_its_product():
    main = hlo.parse(_FUSED).computations["main"]
    found = [hlo.flops(main.by_name[name], main) for name in ("up", "down")]
    assert found == [2 * 128 * 64 * 512, 0]


_ATTENDED = """
HloModule step, is_scheduled=true

ENTRY %main (q: bf16[2,128,4,64], k: bf16[2,128,1,64], v: bf16[2,128,1,64]) -> bf16[2,128,4,64] {
  %q = bf16[2,128,4,64]{3,2,1,0} parameter(0)
  %k = bf16[2,128,1,64]{3,2,1,0} parameter(1)
  %v = bf16[2,128,1,64]{3,2,1,0} parameter(2)
  ROOT %out = bf16[2,128,4,64]{3,2,1,0} custom-call(%q, %k, %v), custom_call_target="__cudnn$fmhaSoftmax"
}
"""  # noqa: E501


def test_attention_of_a_gpu_reads_beside_its_products():
    slice_ = slices.parse("h100:1")
    chip = slice_.chip
    found = schedule.account(hlo.parse(_ATTENDED), {"data": 1}, slice_).seconds
    flops = 2 * 2 * (2 * 4 * 128 * 128 * 64) / 2  # two products, causal
    moved = 2 * 2 * 128 * 64 * (4 + 1 + 1 + 4)
    assert found == pytest.approx(
        flops / (chip.attention_efficiency * chip.peak_flops)
        + moved / (chip.memory_efficiency * chip.hbm_bytes_per_s)
    )


def _multiplied(kind):
    return f"""
HloModule step, is_scheduled=true

ENTRY %main (x: {kind}[2048,8192], y: {kind}[8192,4096]) -> f32[2048,4096] {{
  %x = {kind}[2048,8192]{{1,0}} parameter(0)
  %y = {kind}[8192,4096]{{1,0}} parameter(1)
  ROOT %out = f32[2048,4096]{{1,0}} dot(%x, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
}}
"""  # noqa: E501


@pytest.mark.parametrize(
    ("name", "kind", "slower"),
    [
        ("h100:1", "f8e4m3fn", 0.5),
        ("v5e:1x1", "s8", 0.5),
        ("a100:1", "f8e4m3fn", 1),  # it has no units for it
        ("h100:1", "f32", 2),
        ("v5e:1x1", "f32", 1),
    ],
)
def test_a_product_takes_as_long_as_the_chips_rate_says(name, kind, slower):
    slice_ = slices.parse(name)
    found = schedule.account(hlo.parse(_multiplied(kind)), {"data": 1}, slice_).seconds
    peak = slice_.chip.matmul_efficiency * slice_.chip.peak_flops
    assert found == pytest.approx(slower * 2 * 2048 * 8192 * 4096 / peak)


@pytest.mark.parametrize(
    "name",
    [
        "jit(train_step)/jvp(jit(layer))/mlp/add",
        "jit(train_step)/transpose(jvp(jit(layer)))/mlp/add",
        "jit(train_step)/jvp()/while/body/checkpoint/mlp/add",
    ],
)
def test_origins_of_values_name_the_model_alone(name):
    assert memory.origin(name) == "mlp/add"


@pytest.fixture(scope="module")
def planned():
    """A small step on four chips, compiled to buffers."""
    run = config.resolve(config.check(RUN), 4)
    return run, compiler.compile(run, slices.parse("v5e:2x2"))


def test_the_compiler_sees_the_step_that_trains(planned):
    """Parameters and bytes of a device are those of the program on CPU devices."""
    run, said = planned
    grid = mesh.build(run.mesh, jax.devices()[:4])
    state = build(run, grid).state
    assert said.parameters == sum(x.size for x in jax.tree.leaves(state.weights))
    assert said.by_class["parameters"] == sharding.nbytes(state.weights)
    assert said.by_class["optimizer"] == sharding.nbytes(state.opt_state)
    assert sum(said.by_class.values()) == said.peak_bytes
    assert said.fits
    assert 0 < said.peak_bytes < slices.parse("v5e:2x2").chip.hbm_bytes


def test_weights_travel_as_often_as_they_must(planned):
    """Gathered forward and backward; gradients summed; over the one axis there is."""
    run, said = planned
    assert set(said.step.communication) == {"fsdp"}
    sums = said.step.communication["fsdp"]
    weights = flops.matmul_weights(run.model)
    # Three quarters come from others: of bfloat16 twice, of float32 gradients once,
    # or twice where the sum goes to all, as small ones do; the head's gathered once.
    gathered = 2 * (2 * weights - run.model.d_model * run.model.vocab_size) * 3 / 4
    scattered = 4 * weights * 3 / 4
    assert gathered + scattered < sums["bytes"] < gathered + 2 * scattered
    assert sum(said.step.by_class.values()) == pytest.approx(said.step.seconds)


@pytest.mark.slow
def test_replicas_meet_once_in_however_many_parts():
    """Shards are gathered and scattered in each part, and summed after the last."""
    sent = {}
    for parts, gradients in ((1, "float32"), (4, "float32"), (4, "bfloat16")):
        run = small.changed(
            RUN,
            batch_size=8 * parts,
            accumulate_steps=parts,
            mesh=MeshConfig(data=2, fsdp=2),
            precision=PrecisionConfig(gradients=gradients),
        )
        run = config.resolve(config.check(run), 4)
        said = compiler.compile(run, slices.parse("v5e:2x2"))
        axes = said.step.communication
        its = {name: each["bytes"] for name, each in axes.items()}
        sent[parts, gradients] = its
        # Of gradients of half the parameters half is sent and half fetched.
        size = jnp.dtype(gradients).itemsize
        assert its["data"] == pytest.approx(size * said.parameters / 2, rel=0.02)
    first, whole, low = (each["fsdp"] for each in sent.values())
    assert whole == pytest.approx(4 * first, rel=0.1)
    # Of a weight 2 bytes are gathered twice, and 4 or 2 of its gradient scattered; this
    # small, the compiler sums some whole that are of 2.
    assert low < 0.85 * whole


def test_arithmetic_is_counted_to_the_flop():
    """Dots and convolutions of the compiled step against the formula."""
    run = config.resolve(small.changed(RUN, mesh=MeshConfig()), 1)
    found = []

    def count(module, axes, slice_):
        def walk(name, times):
            computation, total = module.computations[name], 0
            for each in computation.instructions:
                inner = each.called("body") or each.called("calls")
                if inner in module.computations:
                    trips = module.trips(each) if each.opcode == "while" else 1
                    total += walk(inner, times * trips)
                total += times * hlo.flops(each, computation)
            return total

        found.append(walk(module.entry, 1))
        return compiler.schedule.Step(1.0, {}, {})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiler.schedule, "account", count)
        compiler.compile(run, slices.parse("v5e:1x1"))
    _, palm = flops.flops_per_token(run)  # the plain attention computes every score
    assert found[0] == pytest.approx(palm * run.batch_size * run.seq_len, rel=0.01)


@pytest.mark.slow
def test_what_does_not_fit_comes_with_what_would():
    """One chip, a step far too large, whose cutting into parts fits."""
    run = small.changed(
        RUN, batch_size=512, seq_len=1024, mesh=MeshConfig(), model__vocab_size=32_768
    )
    request = command.Request(slices=(slices.parse("v5e:1x1"),), wanted=WANTED)
    found = command.plan(run, request)
    assert not found["fits"]
    assert found["hbm_peak_bytes"] > found["hbm_limit_bytes"]
    assert "attention" in found["largest_buffers"][0][1]
    assert found["remedies"]
    for remedy in found["remedies"]:
        assert remedy["fits"]
        assert remedy["overrides"]
    words = report.in_words(found)
    assert "DOES NOT FIT" in words
    assert "Changes that make it fit" in words
    assert words.endswith("take one of the changes above. There is nothing to run.")


def test_remedies_go_from_one_change_to_all_of_them_at_once():
    run = small.changed(
        RUN, batch_size=16, mesh=MeshConfig(data=2, fsdp=2), model__remat="dots"
    )
    slice_ = slices.parse("v5e:2x2")
    found = search.remedies(config.resolve(run, 4), slice_)
    remat = {"model.remat": "full", "model.remat_save": ()}
    assert found[0] == {"accumulate_steps": 2}
    assert found[-1] == {
        "accumulate_steps": 4, "mesh.data": 1, "mesh.fsdp": 4, **remat,
    }  # fmt: skip
    assert all(found.count(each) == 1 for each in found)
    whole = small.changed(run, batch_size=4, model__remat="full")
    assert search.remedies(config.resolve(whole, 4), slice_)[0] == found[3]


def test_a_plan_holds_what_it_promises():
    request = command.Request(
        slices=(slices.parse("v5e:2x2"),), wanted=Wanted(spec="x.py", tokens=1e9)
    )
    found = command.plan(RUN, request)
    assert found.keys() >= KEYS
    json.dumps(found)
    causal, _ = flops.flops_per_token(RUN)
    assert found["overrides"] == {}
    assert found["mfu"] == pytest.approx(
        causal * found["tokens_per_s_per_chip"] / 197e12
    )
    assert found["hours"] == pytest.approx(
        1e9 / (4 * found["tokens_per_s_per_chip"]) / 3600
    )
    words = report.in_words(found)
    assert "launch/tpu_vm.sh --topology=v5e:2x2 -- --config=x.py" in words
    assert "GiB to spare" in words


@pytest.mark.slow
def test_a_search_keeps_what_fits_first(monkeypatch, capsys):
    monkeypatch.setattr(search.layouts, "__defaults__", (2,))
    monkeypatch.setenv("JAX_OPTIMIZATION_LEVEL", "O0")  # machine code in a third
    request = command.Request((slices.parse("v5e:2x2"),), search=True, wanted=WANTED)
    found = command.plan(RUN, request)
    assert len(found["candidates"]) == 4
    twins = [c for c in found["candidates"] if "model.layers" in c["overrides"]]
    assert len(twins) == 2
    for twin in twins:
        scanned = {**twin["overrides"]}
        assert scanned.pop("model.layers") == "unroll"
        assert scanned in [c["overrides"] for c in found["candidates"]]
    seconds = [c["step_time_s"] for c in found["candidates"] if c["fits"]]
    assert seconds == sorted(seconds)
    assert all(each.keys() >= KEYS for each in found["candidates"])
    best = found["candidates"][0]["overrides"]
    assert found["overrides"] == best
    assert found["source"] == "compiled"  # the best one, to machine code
    assert all(f"--config.{path}=" in found["command"] for path in best)
    assert "2/2 layouts of v5e:2x2" in capsys.readouterr().err


def _said(seconds, peak_bytes=2**30):
    """Returns a compiler's report, without a compiler."""
    step = schedule.Step(seconds, {"matmul": seconds}, {})
    return compiler.Report(1, True, peak_bytes, 0, {}, [], step, False, None, None)


def test_an_interrupted_search_keeps_what_is_known(monkeypatch, capsys):
    """The best of two of them, which is not compiled whole; none at all is an end."""

    def reports(runs, slice_, known):
        for index in range(known):
            yield index, _said(3.0 - index)
        raise KeyboardInterrupt

    request = command.Request((slices.parse("v5e:2x2"),), search=True, wanted=WANTED)
    for known in (2, 0):
        monkeypatch.setattr(
            compiler, "compile_all", functools.partial(reports, known=known)
        )
        if known:
            found = command.plan(RUN, request)
        else:
            with pytest.raises(KeyboardInterrupt):
                command.plan(RUN, request)
    assert [each["step_time_s"] for each in found["candidates"]] == [2.0, 3.0]
    assert found["source"] == "compiled to buffers"
    assert "stopped; this is what is known" in capsys.readouterr().err


@pytest.mark.parametrize("end", [KeyboardInterrupt(), PlanError("no room")])
def test_a_search_outlives_the_whole_compilation(end, monkeypatch, capsys):
    """Of the best one, which takes minutes."""

    def reports(runs, slice_, *, full=False):
        if full:
            raise end
        for index in range(2):
            yield index, _said(3.0 - index)

    monkeypatch.setattr(search.layouts, "__defaults__", (2,))
    monkeypatch.setattr(search, "unrolled", lambda run, found: [])
    monkeypatch.setattr(compiler, "compile_all", reports)
    request = command.Request((slices.parse("v5e:2x2"),), search=True, wanted=WANTED)
    found = command.plan(RUN, request)
    assert [each["step_time_s"] for each in found["candidates"]] == [2.0, 3.0]
    assert found["source"] == "compiled to buffers"
    assert ("stopped" if not str(end) else "no room") in capsys.readouterr().err


@pytest.mark.parametrize("searched", [True, False])
def test_interrupted_comparisons_keep_what_is_known(searched, monkeypatch):
    """The slices that are done, and of a search also the one under way."""
    names = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1")

    def reports(runs, slice_, *, full=False):
        yield 0, _said(2.0)
        if slice_.name == names[1]:
            raise KeyboardInterrupt

    def compile_(run, slice_, *, full=False):
        if slice_.name == names[1]:
            raise KeyboardInterrupt
        return _said(2.0)

    monkeypatch.setattr(search.layouts, "__defaults__", (1,))
    monkeypatch.setattr(search, "unrolled", lambda run, found: [])
    monkeypatch.setattr(compiler, "compile_all", reports)
    monkeypatch.setattr(compiler, "compile", compile_)
    request = command.Request(
        tuple(map(slices.parse, names)), search=searched, wanted=WANTED
    )
    known = names[: 1 + searched]
    found = command.plan(RUN, request)
    told = [each["topology"] for each in found.get("slices", [found])]
    assert sorted(told) == sorted(known)


@pytest.mark.parametrize("interrupted", [True, False])
def test_an_interrupted_plan_is_told_and_not_done(interrupted, monkeypatch, capsys):
    result = Result({}, "a plan", interrupted)
    small.replace_command(monkeypatch, "plan", lambda run, args: result)
    argv = ["scaletrain", "plan", "--config=experiments/quickstart.py"]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # main's own default
    code = 0
    try:
        main.main()
    except SystemExit as err:
        code = err.code
    assert capsys.readouterr().out == "a plan\n"
    assert code == (130 if interrupted else 0)


def test_an_interrupt_ends_the_compilers(tmp_path, monkeypatch):
    """Whoever stops asking for reports leaves no process and no file behind."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    runs = [config.resolve(RUN, 4)] * 2
    started, popen = [], subprocess.Popen

    def kept(*args, **settings):
        started.append(popen(*args, **settings))
        return started[-1]

    monkeypatch.setattr(compiler.subprocess, "Popen", kept)

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(compiler.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(compiler.compile_all(runs, slices.parse("v5e:2x2")))
    assert started
    assert all(each.returncode is not None for each in started)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_plan_leaves_nothing_behind(tmp_path, number):
    """Neither the compiler's process nor its folder, which has the compiler's logs."""
    planner = subprocess.Popen(
        [
            sys.executable, "-m", "scaletrain.main", "plan", "--topology=v5e:2x2",
            "--config=experiments/gpt2_124m.py",
        ],
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip

    def until(done):
        deadline = time.monotonic() + 60
        while not done():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    until(lambda: list(tmp_path.glob("scaletrain-plan-*/tpu_driver*")))
    [line] = subprocess.run(
        ["ps", "-ww", "--ppid", str(planner.pid), "-o", "pid="],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    worker = pathlib.Path("/proc", line.strip())
    planner.send_signal(number)
    # SIGTERM ends it as Ctrl-C does, with the plans known by then.
    assert planner.wait() == (130 if number == signal.SIGTERM else -number)
    until(lambda: not list(tmp_path.iterdir()))
    until(lambda: not worker.exists())


def test_a_full_disk_is_told_of(tmp_path, monkeypatch):
    """The compiler writes on as if nothing were; at the start, and under way."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run, slice_ = config.resolve(RUN, 4), slices.parse("v5e:2x2")
    usage, sizes = shutil.disk_usage(tmp_path), [1000, 2**40, 1000]

    def left(folder):
        return usage._replace(free=sizes.pop(0))

    monkeypatch.setattr(compiler.shutil, "disk_usage", left)
    for still in (2, 0):
        with pytest.raises(PlanError, match=f"{tmp_path} has 1,000 bytes left; set"):
            compiler.compile(run, slice_)
        assert len(sizes) == still
        assert not list(tmp_path.iterdir())


def test_layouts_cut_sequences_where_attention_can():
    """Of every mesh that the settings admit; kernels take whole sequences."""
    slice_ = slices.parse("v5e:2x4")
    run = small.changed(RUN, seq_len=8192, model__attention="xla", batch_size=1)
    found = search.layouts(run, slice_, 24)
    assert all(each["mesh.context"] > 1 for each in found[:1])
    assert {each["model.layers"] for each in found} == {"scan"}
    for each in found:
        search.laid_out(run, each, slice_)
    kernel = small.changed(run, model__attention="splash", batch_size=8)
    found = search.layouts(kernel, slice_, 24)
    assert found
    assert {each["mesh.context"] for each in found} == {1}


def test_a_search_replaces_what_crosses_slices():
    """Whatever the settings had for another number of slices."""
    run = small.changed(RUN, mesh=MeshConfig(fsdp=8, dcn=AxesConfig(fsdp=2)))
    found = search.layouts(run, slices.parse("v5e:2x2", 2))
    assert found
    assert {(o["mesh.dcn.data"], o["mesh.dcn.fsdp"]) for o in found} == {(2, 1)}


def test_a_comparison_leaves_out_what_can_hold_nothing(monkeypatch, capsys):
    """If it is not all there is."""

    def layouts(run, slice_):
        return [] if slice_.name == "v5e:1x1" else [{"mesh.fsdp": 4}]

    monkeypatch.setattr(search, "layouts", layouts)
    monkeypatch.setattr(search, "unrolled", lambda run, found: [])
    monkeypatch.setattr(
        compiler, "compile_all", lambda *_, full=False: iter([(0, _said(1.0))])
    )
    names = ("v5e:2x2", "v5e:1x1")
    request = command.Request(
        tuple(map(slices.parse, names)), search=True, wanted=WANTED
    )
    assert command.plan(RUN, request)["topology"] == "v5e:2x2"
    assert "v5e:1x1 is left out" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="no layout of v5e:1x1"):
        command.plan(RUN, command.Request(request.slices[1:], search=True))


def test_slices_are_compared():
    """In time, money and carbon, among those that fit."""
    sizes = {"v5e:2x2": (1.5, 2**30), "v5p:2x2x1": (1.0, 2**30), "v4:2x2x1": (9, 2**60)}
    records = [
        record.of(RUN, slices.parse(name), _said(*size), {}, WANTED)
        for name, size in sizes.items()
    ]
    found = record.compared(records)
    assert (found["fastest"], found["cheapest"], found["greenest"]) == (
        "v5p:2x2x1", "v5e:2x2", "v5e:2x2",
    )  # fmt: skip
    assert [each["topology"] for each in found["slices"]] == [
        "v5p:2x2x1", "v5e:2x2", "v4:2x2x1",
    ]  # fmt: skip
    assert record.pareto_optimal(records) == [True, True, False]
    words = report.in_words(found["slices"][0] | found)
    assert "greenest: v5e:2x2" in words


@pytest.mark.parametrize(
    ("name", "num_slices", "line"),
    [
        ("v5p:4x4x4", 1, "launch/tpu_vm.sh --topology=v5p:4x4x4 -- --config=x.py"),
        ("v5e:2x2", 2, "launch/tpu_vm.sh --topology=v5e:2x2 --num_slices=2 --"),
        (
            "tpu7x:4x4x4",
            2,
            "launch/gke/jobset.sh --topology=tpu7x:4x4x4"
            " --num_slices=2 --image=IMAGE --claim=CLAIM -- --config=x.py",
        ),
        ("v5p:4x4x16", 1, "launch/gke/jobset.sh --topology=v5p:4x4x16 --image=IMAGE"),
        ("h100:8", 1, "scaletrain train --config=x.py --workdir=WORKDIR"),
        ("h100:32", 1, "sbatch --nodes=4 launch/slurm.sbatch --config=x.py"),
    ],
)
def test_the_command_starts_the_run_on_its_slice(name, num_slices, line):
    given = (("data.path", "gs://b/*.parquet"), ("batch_size", "4"))
    chosen = {"batch_size": 8, "model.remat_save": ("query", "key")}
    found = record.launch_command("x.py", given, chosen, slices.parse(name, num_slices))
    assert found.startswith(line)
    assert found.endswith(
        " '--config.data.path=gs://b/*.parquet' --config.batch_size=8"
        " --config.model.remat_save=query,key"
    )


def test_gpus_are_worked_out_by_hand():
    found = command.plan(
        small.changed(RUN, mesh=MeshConfig(fsdp=8)),
        command.Request(slices=(slices.parse("h100:8"),), wanted=WANTED),
    )
    assert found["source"] == "worked out by hand, without a compiler"
    assert found.keys() >= KEYS
    assert sum(found["hbm_by_class"].values()) == found["hbm_peak_bytes"]


def test_offloaded_values_leave_the_chip(monkeypatch):
    run = small.changed(
        RUN, model__remat="save", model__remat_offload=("residual", "attention")
    )
    run = config.resolve(config.check(run), 4)
    slow = Figure(1e6, "so slow that it is late")
    v5e = dataclasses.replace(chips.CHIPS["v5e"], host_bytes_per_s=slow)
    monkeypatch.setitem(chips.CHIPS, "v5e", v5e)
    said = compiler.compile(run, slices.parse("v5e:2x2"))
    assert said.host_bytes > 0
    assert said.step.by_class["host_offload"] > said.host_bytes / 1e6


def test_two_slices_are_two_parts_of_the_mesh():
    slice_ = slices.parse("v5p:2x2x1", 2)
    found = command.plan(RUN, command.Request(slices=(slice_,), wanted=WANTED))
    assert (found["num_chips"], found["num_slices"]) == (8, 2)
    assert found["command"].endswith("--workdir=WORKDIR --config.mesh.dcn.data=2")
    assert found["fits"]


SPLASH = small.changed(RUN, model__attention="auto", model__num_kv_heads=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_attention_is_a_kernel_on_tpus(name):
    """Its time is counted, and its scores are not in memory."""
    plain, kernel = (
        compiler.compile(
            config.resolve(small.changed(run, seq_len=2048, batch_size=4), 4),
            slices.parse(name),
        )
        for run in (small.changed(SPLASH, model__attention="xla"), SPLASH)
    )
    assert kernel.peak_bytes < plain.peak_bytes
    assert kernel.step.by_class["attention"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("experiment", "name", "overrides"), plans.SLICES)
def test_experiments_fit_their_slices(experiment, name, overrides):
    """Those of `make plan-all`: compiled if that is quick, or else lowered."""
    run, slice_ = plans.resolved(experiment, name, overrides)
    if slice_.devices > 64:
        program = build(run, mesh.build(run.mesh, _devices(name)))
        with jax.set_mesh(program.mesh):
            compilation.jitted(program).lower(program.state, program.batch)
        assert sharding.nbytes(program.state) < slice_.chip.hbm_bytes
    else:
        said = compiler.compile(run, slice_)
        assert said.fits
        assert said.peak_bytes <= slice_.chip.hbm_bytes


def _layers(module, layers):
    """Returns the collectives of each loop over the layers, by opcode."""
    found = []
    for computation in module.computations.values():
        for each in computation.instructions:
            if each.opcode == "while" and module.trips(each) == layers:
                body = module.computations[each.called("body")]
                found.append([
                    (one.opcode, one.name, str(one.shapes[-1]))
                    for one in body.instructions
                    if one.opcode in hlo.COLLECTIVES
                    or (one.opcode == "async-start" and "slice" not in one.name)
                ])  # fmt: skip
    return [each for each in found if each]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v5p:4x4x4", "v6e:4x4"])
def test_collectives_are_as_few_and_as_late_as_promised(name, monkeypatch):
    """Of a layer, four matrices gathered in each direction and four gradients summed.

    As the options of these chips promise, no gathering holds up the matmuls; every
    matrix is cut over all devices, and all that the step replaces is given in place.
    """
    texts, parse = [], hlo.parse

    def kept(text):
        texts.append(text)
        return parse(text)

    monkeypatch.setattr(compiler.hlo, "parse", kept)
    slice_ = slices.parse(name)
    run = config.load("experiments/llama3_8b.py")
    overrides = {
        "model.num_layers": 4, "batch_size": slice_.devices, "accumulate_steps": 1,
        "mesh.fsdp": slice_.devices,
    }  # fmt: skip
    run = command.resolved(config.applied(run, overrides), slice_)
    compiler.compile(run, slice_)
    module = parse(texts[0])
    forward, backward = sorted(_layers(module, 4), key=len)

    def gathered(each):
        return each[0] == "async-start" and "all-gather" in each[1]

    assert len(forward) == sum(map(gathered, forward)) == 4, forward
    assert sum(map(gathered, backward)) == 4, backward
    sums = [each for each in backward if not gathered(each)]
    assert {opcode for opcode, _, _ in sums} == {"all-reduce"}, backward
    assert len(sums) == 4  # the norms' go with a matrix's

    state = build(run, mesh.build(run.mesh, _devices(name))).state
    sizes = {
        int(each.operands[0]): each.nbytes
        for each in module.computations[module.entry].instructions
        if each.opcode == "parameter"
    }
    kept_in_place = set(map(int, re.findall(r"\((\d+), \{\}, ", texts[0][:100_000])))
    arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.size > 2]
    assert sum(sizes[i] > 8 for i in kept_in_place) == len(arrays)
    # What the program is given is what the state has on a device, array by array.
    assert sorted(sizes[i] for i in kept_in_place if sizes[i] > 8) == sorted(
        sharding.nbytes(leaf) for leaf in arrays
    )
    matrices = [leaf for leaf in arrays if leaf.size > 1_000_000]
    assert len(matrices) == 3 * 9  # and both moments
    for leaf in matrices:
        assert sharding.nbytes(leaf) * slice_.devices == leaf.size * 4


@pytest.fixture
def not_kept():
    """Keeps executables out of the tests' cache: none of a TPU is read back here."""
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, 1e9)
    yield
    jax.config.update(least, before)


def _devices(name):
    os.environ.update(compiler.WITHOUT_TPU)
    slice_ = slices.parse(name)
    return topologies.get_topology_desc(
        topology_name=slice_.topology, platform="tpu", **slice_.kwargs
    ).devices


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"]
)
def test_the_attention_kernel_becomes_machine_code(name, not_kept):
    """Forward and backward, with documents and a window, for every generation.

    In blocks of the size that the generation gets: fast memory holds them.
    """
    devices = _devices(name)
    grid = mesh.build(MeshConfig(fsdp=len(devices)), devices)
    how = attention.Scores(scale=0.1, window=256)

    def run(q, k, v, segments):
        out = attention.attend(
            q, k, v, q_segments_BT=segments, kv_segments_BS=segments, scores=how,
            implementation="splash",
        )  # fmt: skip
        return jnp.sum(out.astype(jnp.float32))

    rows = NamedSharding(grid, jax.P("fsdp"))
    q, k = (
        jax.ShapeDtypeStruct((8, 1024, heads, 128), jnp.bfloat16, sharding=rows)
        for heads in (4, 2)
    )
    segments = jax.ShapeDtypeStruct((8, 1024), jnp.int32, sharding=rows)
    with jax.set_mesh(grid):
        lowered = jax.jit(jax.grad(run, (0, 1, 2))).lower(q, k, k, segments)
        text = lowered.compile().as_text()
    assert text.count("tpu_custom_call") >= 2
    chip = chips.by_kind(devices[0].device_kind)
    assert chip.generation == name.partition(":")[0]
    assert f'\\"block_q\\": {chip.tpu.splash_block}' in text


def test_options_that_the_compiler_does_not_know_are_named(monkeypatch):
    run = config.resolve(small.RUN, 1)
    options = {"xla_no_such_option": 3, "xla_cpu_enable_fast_math": False}
    monkeypatch.setattr(chips, "compiler_options", lambda kind: options)
    program = build(run, mesh.build(run.mesh, jax.devices()[:1]))
    with (
        jax.set_mesh(program.mesh),
        pytest.warns(UserWarning, match="compiler option xla_no_such_option=3"),
    ):
        compilation.compiled(program)
    assert "xla_no_such_option" in options  # the table is as it was


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x"])
def test_options_of_tpus_are_known_to_their_compiler(kind):
    names = {"TPU v5 lite": "v5e:2x2", "TPU v5": "v5p:2x2x1",
             "TPU v6 lite": "v6e:2x2", "TPU7x": "tpu7x:2x2x1"}  # fmt: skip
    devices = _devices(names[kind])
    assert devices[0].device_kind == kind
    where = jax.sharding.SingleDeviceSharding(devices[0])
    given = jax.ShapeDtypeStruct((8, 128), jnp.float32, sharding=where)
    options = chips.compiler_options(kind)
    # Without a TPU an executable that was kept cannot be read again.
    least = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, least)
    jax.config.update(least, math.inf)
    try:
        jax.jit(lambda x: x + 1).lower(given).compile(compiler_options=options)
    finally:
        jax.config.update(least, before)


def _dots(jaxpr):
    """Returns the FLOPs of every matmul of a traced step, on all devices."""
    total = 0
    for each in jaxpr.eqns:
        if each.primitive.name == "dot_general":
            (over, _), _ = each.params["dimension_numbers"]
            shape = each.invars[0].aval.shape
            over = math.prod(shape[i] for i in over)
            total += 2 * math.prod(each.outvars[0].aval.shape) * over
        times = each.params["length"] if each.primitive.name == "scan" else 1
        times *= each.params["mesh"].size if each.primitive.name == "shard_map" else 1
        for value in each.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += times * _dots(inner) if hasattr(inner, "eqns") else 0
    return total


def _placed(shapes):
    return jax.tree.map(
        lambda leaf: jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding),
        shapes,
    )


@pytest.mark.slow
def test_small_runs_are_the_same_everywhere(monkeypatch):
    """20 random settings: what is planned for a slice, and what 8 devices hold and do.

    Parameters, and bytes of them and of the optimizer on each device, as the planner's
    process tells them, against the arrays that train begins with; FLOPs against those
    of every matmul in the step.
    """
    for name, value in compiler.WITHOUT_TPU.items():
        monkeypatch.setenv(name, value)
    slice_ = slices.parse("v5e:2x4")
    rng = np.random.default_rng(0)
    for i in range(20):
        run = small.changed(
            small.RUN,
            model__num_layers=int(rng.integers(1, 4)),
            model__num_heads=int(rng.choice([2, 4, 8])),
            model__num_kv_heads=2,
            model__d_head=int(rng.choice([8, 16])),
            model__d_ff=int(rng.choice([64, 128])),
            model__mlp=str(rng.choice(["swiglu", "gelu"])),
            model__head=str(rng.choice(["tied", "untied"])),
            model__attention="xla",
            optim__name=str(rng.choice(["adamw", "lion", "adafactor"])),
            mesh=[MeshConfig(fsdp=8), MeshConfig(fsdp=4, tensor=2)][rng.integers(2)],
        )
        run = config.resolve(config.check(run), 8)
        _, told = compile_worker.described({
            "config": config.to_json(run), "topology": slice_.topology,
            "platform": slice_.platform, "kwargs": slice_.kwargs,
        })  # fmt: skip
        program = build(run, mesh.build(run.mesh, jax.devices()))
        with jax.set_mesh(program.mesh):
            # train's own takes a second to compile; it begins with these shapes.
            state = (
                train.initial(program, with_frozen=False)
                if i < 3
                else _placed(program.state)
            )
            jaxpr = jax.make_jaxpr(functools.partial(step.train_step, program=program))(
                program.state, program.batch
            )
        assert told["parameters"] == sum(x.size for x in jax.tree.leaves(state.weights))
        for part, of in (("parameters", state.weights), ("optimizer", state.opt_state)):
            for device in range(8):
                assert told["bytes"][part] == sum(
                    leaf.addressable_shards[device].data.nbytes
                    for leaf in jax.tree.leaves(of)
                ), part
        _, palm = flops.flops_per_token(run)  # plain attention makes every score
        assert palm * run.batch_size * run.seq_len == _dots(jaxpr.jaxpr)
        assert estimate.parameters(run) == told["parameters"]


@pytest.mark.parametrize(
    ("settings", "precision"),
    [
        ({}, {}),
        ({"bias": "all", "norm": "layer", "positions": "learned",
          "max_positions": 32, "mlp": "gelu"}, {}),
        ({"norm_order": "both", "qk_norm": "head"}, {}),
        ({"head": "untied"}, {"matmul": "fp8", "scaling": "delayed"}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("rank", [0, 4])
def test_a_plan_by_hand_counts_every_parameter_of_the_step(settings, precision, rank):
    run = small.changed(
        small.RUN, lora__rank=rank, mesh__fsdp=1, mesh__data=1,
        **{f"model__{name}": value for name, value in settings.items()},
        **{f"precision__{name}": value for name, value in precision.items()},
    )  # fmt: skip
    state = build(run, mesh.build(run.mesh, jax.devices()[:1])).state
    wanted = sum(leaf.size for leaf in jax.tree.leaves(state.weights))
    assert estimate.parameters(run) == wanted


WRONG = [
    (["--topology=v5p:4x4x5"], "v5p has no such slice; the nearest is v5p:4x4x4"),
    ([], "--topology, --topologies; give one of the two"),
    (["--topology=v5p:4x4x8"], "128 devices are in v5p:4x4x8; set mesh.fsdp=128"),
    (["--topology=v5p:4x4x4", "--num_slices=0"], "--num_slices=0; below 1"),
    (["--topology=v5p:4x4x4", "--pue=0.2"], "--pue=0.2; below 1.0"),
    (
        ["--topology=v5p:4x4x4", "--config.mesh.fsdp=16", "--config.mesh.tensor=64"],
        "mesh.tensor=64; does not divide model.num_heads=32",
    ),
]


@pytest.mark.parametrize(("args", "words"), WRONG)
def test_plans_that_cannot_work_are_one_clear_line(args, words):
    done = subprocess.run(
        [
            sys.executable, "-m", "scaletrain.main", "plan",
            "--config=experiments/llama3_8b.py", *args,
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_without_the_compiler_it_is_told_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install -e '.\[plan\]'"):
        command.plan(RUN, command.Request(slices=(slices.parse("v5e:2x2"),)))
