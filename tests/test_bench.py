"""The bench: its contract, the shapes it measures, and how it reads a trace."""

import argparse
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small

from scaletrain import bench, config, flops, hlo, matrices, mesh
from scaletrain.bench import (
    command,
    measure,
    microbench,
    profile,
    roofline,
    shapes,
    sweep,
)
from scaletrain.commands import line
from scaletrain.config import LoraConfig, MeshConfig
from scaletrain.errors import BenchError, CheckpointError, ConfigError
from scaletrain.hardware import chips
from scaletrain.program import build, initial

KEYS = {
    "step_time_s", "step_time_spread", "tokens_per_s_per_device", "mfu", "mfu_palm",
    "peak_flops", "peak_memory_bytes", "compile_time_s", "roofline",
    "achieved_over_ideal", "device", "config",
}  # fmt: skip
RUN = small.changed(small.RUN, mesh=MeshConfig(data=2, fsdp=-1))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Returns what a bench of a small run says, with data and a trace."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofline, "COPY_BYTES", 2**16)
        patch.setattr(roofline, "MESSAGE_BYTES", 2**12)
        folder = tmp_path_factory.mktemp("trace")
        request = command.Request(steps=3, data=True, profile=True, workdir=str(folder))
        return bench.benchmark(RUN, request)


def test_keys_are_the_contract(found):
    assert found.keys() == KEYS | {"data_wait", "profile"}
    assert json.loads(json.dumps(found)) == found
    assert found["device"]["count"] == 8
    assert found["config"]["mesh"]["fsdp"] == 4
    assert found["config"]["model"]["attention"] == "xla"


def test_numbers_follow_from_each_other(found):
    tokens = RUN.batch_size * RUN.seq_len / 8
    assert found["tokens_per_s_per_device"] * found["step_time_s"] == pytest.approx(
        tokens
    )
    assert found["mfu"] is found["mfu_palm"] is found["peak_flops"] is None
    assert 0 <= found["data_wait"] <= 1
    assert found["peak_memory_bytes"] > 0
    ideal = found["roofline"]["ideal"]
    assert found["achieved_over_ideal"] == ideal["step_s"] / found["step_time_s"]


def test_the_ideal_step_is_the_sum_of_its_parts(found):
    said = found["roofline"]
    gemms = sum(
        each["count"] * (each["forward_s"] + each["dgrad_s"] + each["wgrad_s"])
        for each in said["gemms"].values()
    )
    attention = sum(
        each["count"] * each["forward_backward_s"]
        for each in said["attention"].values()
    )
    assert said["ideal"]["gemms_s"] == pytest.approx(gemms)
    assert said["ideal"]["attention_s"] == pytest.approx(attention)
    assert said["ideal"]["step_s"] == pytest.approx(
        gemms + attention + said["optimizer_s"]
    )
    assert list(said["gemms"]) == ["q", "k", "v", "o", "gate", "up", "down", "head"]


def test_collectives_are_measured_over_the_axes_in_use(found):
    said = found["roofline"]["collectives"]
    assert said.keys() == {"data", "fsdp"}
    for speeds in said.values():
        assert speeds.keys() == {"all_gather", "reduce_scatter", "all_reduce"}
        assert min(speeds.values()) > 0


def test_a_trace_of_the_cpu_says_where_the_time_went(found):
    said = found["profile"]
    assert {"matmul", "collective"} <= said["by_class"].keys()
    assert {"attention", "mlp", "head", "embedding", "optimizer"} <= said[
        "by_scope"
    ].keys()
    assert said["by_scope"]["mlp"]["matmul"] > 0
    assert len(said["devices"]) == 8
    assert all("host" in device for device in said["devices"])
    assert sum(map(sum, (s.values() for s in said["by_scope"].values()))) == (
        pytest.approx(sum(said["by_class"].values()))
    )


def test_words_name_what_was_found(found):
    words = bench.in_words(
        found
        | {
            "candidates": [
                {
                    "overrides": {"batch_size": 8, "model.remat_save": ("attention",)},
                    "fits": True,
                    "problem": "",
                    "step_time_s": 0.5,
                    "tokens_per_s_per_device": 1234.0,
                    "peak_memory_bytes": 2**30,
                }
            ]
        }
    )
    for each in (
        "8 x cpu", "MFU: n/a", "Waiting for data", "over mesh.fsdp", "Longest:",
        "host's threads", "--config.batch_size=8 --config.model.remat_save=attention",
    ):  # fmt: skip
        assert each in words, each
    assert max(map(len, words.splitlines())) < 160
    known = found | {"mfu": 0.5, "mfu_palm": 0.6, "peak_flops": 989e12}
    assert "MFU: 50.0%, PaLM's 60.0%, of 989 TFLOP/s" in bench.in_words(known)


@pytest.mark.parametrize(
    ("devices", "settings"),
    [
        (1, {}),
        (4, {"mesh": MeshConfig(data=2, fsdp=2), "accumulate_steps": 2}),
        (2, {"mesh": MeshConfig(tensor=2), "model__mlp": "gelu"}),
        (4, {"mesh": MeshConfig(context=2, fsdp=2)}),
        (2, {"mesh": MeshConfig(dcn=config.AxesConfig(data=2))}),
        (1, {"model__sliding_window": 8, "model__global_every": 2}),
        (1, {"model__head": "tied", "model__sliding_window": 8}),
        (1, {"lora": LoraConfig(rank=4), "init_from": "x"}),
    ],
)
def test_shapes_have_the_flops_of_the_run(devices, settings):
    run = config.resolve(small.changed(small.RUN, **settings), devices)
    tokens = run.batch_size * run.seq_len
    gemms = shapes.gemms(run)
    found = sum(each.count * each.flops * len(each.passes) for each in gemms.values())
    weight_flops = 4 if run.lora.rank else 6
    weights = weight_flops * flops.matmul_weights(run.model)
    assert found * devices == weights * tokens
    attention = shapes.attentions(run)
    found = sum(each.count * 3 * each.flops for each in attention.values())
    plain = small.changed(run, lora=LoraConfig(), init_from="")
    causal, _ = flops.flops_per_token(plain)
    rest = causal - 6 * flops.matmul_weights(run.model)
    assert found * devices == pytest.approx(rest * tokens)


def test_a_device_has_its_part_of_the_heads_and_of_the_batch():
    run = small.changed(
        small.RUN, mesh=MeshConfig(fsdp=2, context=2, tensor=2), accumulate_steps=4
    )
    run = config.resolve(run, 8)
    q, o = shapes.gemms(run)["q"], shapes.gemms(run)["o"]
    rows = 16 // 4 // 2 * 32 // 2
    assert (q.rows, q.inputs, q.outputs, q.count) == (rows, 32, 16, 8)
    assert (o.rows, o.inputs, o.outputs) == (rows, 16, 32)
    assert (shapes.gemms(run)["down"].inputs, shapes.gemms(run)["up"].outputs) == (
        32,
        32,
    )
    assert shapes.gemms(run)["head"].count == 4
    (attention,) = shapes.attentions(run).values()
    assert (attention.rows, attention.queries, attention.keys) == (2, 16, 32)
    assert (attention.heads, attention.kv_heads) == (2, 1)


def test_no_repetition_is_left_out():
    x, w = jnp.ones((64, 32)), jnp.full((32, 16), 0.01)
    dot = functools.partial(jnp.einsum, "mk,kn->mn")
    run = microbench.compiled(
        jax.jit(functools.partial(microbench.looped, dot)), x, jnp.zeros((64, 16)), w
    )
    module = hlo.parse(run.as_text())
    inside = [
        each
        for computation in module.computations.values()
        for each in computation.instructions
    ]
    (loop,) = (each for each in inside if each.opcode == "while")
    assert module.trips(loop) == microbench.REPEATS
    body = module.computations[loop.called("body")]
    matmuls = [each for each in body.instructions if _multiplies(each, module)]
    assert len(matmuls) == 1
    first, out = run(x, jnp.zeros((64, 16)), w)
    np.testing.assert_allclose(out[1:], x[1:] @ w, rtol=1e-6)
    assert first[0, 0] == pytest.approx(np.tanh(out[0, 0]))


def _multiplies(each, module):
    return profile.class_of(each, module) == "matmul"


def test_steps_are_those_of_training():
    run = small.changed(small.RUN, accumulate_steps=2, optim__accumulate="multi_steps")
    run = config.resolve(run, 1)
    grid = mesh.build(run.mesh, jax.devices()[:1])
    program = build(run, grid)
    with jax.set_mesh(grid):
        steps = measure.Steps(program, run, measure.synthetic)
        times, waits = steps.take(3)
        state = initial(program, with_frozen=True)
        feed = measure.synthetic(program)
        for _ in range(3):
            state, _ = steps.compiled(state, feed())
    assert len(times) == len(waits) == 3
    assert min(times) > 0 <= min(waits)
    assert int(steps.state.step) == 3
    for one, two in zip(
        jax.tree.leaves(steps.state), jax.tree.leaves(state), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_synthetic_batches_are_whole_documents():
    run = config.resolve(small.RUN, 1)
    program = build(run, mesh.build(run.mesh, jax.devices()[:1]))
    batch = measure.synthetic(program)()
    assert batch.keys() == program.batch.keys()
    for name, shape in program.batch.items():
        assert (batch[name].shape, batch[name].dtype) == (shape.shape, shape.dtype)
    np.testing.assert_array_equal(batch["tokens"][:, 1:], batch["targets"][:, :-1])
    np.testing.assert_array_equal(batch["positions"][0], np.arange(run.seq_len))
    assert batch["weights"].min() == batch["segments"].max() == 1
    assert batch["tokens"].max() == run.model.vocab_size - 1


def test_medians_and_spread():
    timed = measure.Timed((1.0, 2.0, 3.0, 4.0, 10.0), 0.0, 0.0, None)
    assert timed.step_time_s == 3
    assert timed.spread == pytest.approx((7.6 - 1.4) / 3)


# Sweeps: `speed` stands for the devices.


def swept(speed, run=small.RUN):
    tried = []

    def timed(run):
        tried.append(run)
        seconds = speed(run)
        if isinstance(seconds, Exception):
            raise seconds
        return measure.Timed((seconds,), 0.0, 0.0, None)

    found = sweep.Sweep(config.resolve(run, 1), 1, timed)
    return found, found.best(), tried


def _memory(run):
    """Returns a run's seconds; half as many tokens fit without recomputation."""
    tokens = run.batch_size * {"none": 2, "save": 1.5, "full": 0.5}[run.model.remat]
    if run.model.attention == "splash":
        raise ConfigError(["model.attention=splash; not here; use xla."])
    if tokens > 20:
        return jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    slower = {"none": 1, "save": 1.05, "full": 1.3}[run.model.remat]
    slower *= 1.2 if run.model.layers == "scan" else 1
    return (run.batch_size + 4) * slower


def test_sweep_finds_the_fastest_that_fits(capfd):
    run = small.changed(small.RUN, batch_size=8)
    sweeping, candidates, tried = swept(_memory, run)
    best = candidates[0]
    assert best["overrides"] == {
        "model.attention": "xla", "model.layers": "unroll", "batch_size": 12,
        "model.remat": "save", "model.remat_save": matrices.REMAT_NAMES,
    }  # fmt: skip
    applied = sweeping.applied(best["overrides"])
    assert (applied.batch_size, applied.model.remat) == (12, "save")
    speeds = [each["tokens_per_s_per_device"] for each in candidates]
    assert speeds == sorted(speeds, reverse=True)
    assert not candidates[-1]["fits"]
    assert candidates[-1]["problem"] == "does not fit"
    assert len(tried) == len(set(tried))  # none is tried twice
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(candidates)
    left = [int(line.split("; ")[-1].split()[0]) for line in lines]
    assert left == sorted(left, reverse=True)
    assert left[-1] >= 0


def test_a_sweep_tries_the_units_that_the_device_has(monkeypatch):
    def speed(run):
        return {"compute": 3, "fp8": 1, "int8": 2}[run.precision.matmul]

    def matmuls():
        found = swept(speed)[1]
        return [each["overrides"].get("precision.matmul", "") for each in found]

    assert not any(matmuls())  # a CPU emulates both
    monkeypatch.setattr(chips, "low_precision", lambda kind: {"fp8": 2, "int8": 2})
    assert matmuls()[0] == "fp8"
    assert {"fp8", "int8", ""} == set(matmuls())


def test_an_interrupted_sweep_keeps_what_it_knows():
    def speed(run):
        if run.model.layers == "unroll":
            raise KeyboardInterrupt
        return 1.0

    _, candidates, _ = swept(speed, small.changed(small.RUN, model__attention="xla"))
    assert [each["overrides"] for each in candidates] == [{}]
    assert candidates[0]["fits"]
    with pytest.raises(KeyboardInterrupt):
        swept(speed, small.changed(small.RUN, model__layers="unroll"))


def test_a_sweep_in_which_nothing_fits_is_an_error(monkeypatch):
    def fail(self, count):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(measure.Steps, "__init__", lambda *args: None)
    monkeypatch.setattr(measure.Steps, "measure", fail)
    for is_sweep in (True, False):
        request = command.Request(sweep=is_sweep)
        with pytest.raises(BenchError, match="batch_size=16; .* lower it") as err:
            bench.benchmark(RUN, request)
        assert err.value.exit_code == 1
        # After a sweep in which nothing fits nothing is tried again.
        assert (err.value.__cause__ is None) == is_sweep


def test_several_processes_do_not_sweep(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="--sweep; 2 processes .*; sweep in one"):
        bench.benchmark(RUN, command.Request(sweep=True))


def test_several_processes_make_as_many_calls(monkeypatch):
    calls = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    microbench.median(lambda carry: calls.append(carry) or carry, 0)
    assert len(calls) == 2 + 3 * 4
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    microbench.median(lambda carry: calls.append(carry) or carry, 0)
    assert len(calls) == 14 + 2 + 3 * 16


def test_other_failures_of_the_devices_are_not_hidden(monkeypatch):
    def fail(self, count):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(measure.Steps, "__init__", lambda *args: None)
    monkeypatch.setattr(measure.Steps, "measure", fail)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        bench.benchmark(RUN, command.Request())


def test_a_candidate_that_fails_is_told_with_its_reason():
    def speed(run):
        if run.model.layers == "unroll":
            return jax.errors.JaxRuntimeError("INTERNAL: no such kernel\nmore")
        return 1.0

    _, candidates, _ = swept(speed)
    failed = [each for each in candidates if not each["fits"]]
    assert [each["problem"] for each in failed] == ["fails: INTERNAL: no such kernel"]


# Traces of other devices, as their profilers write them.

HLO = """\
HloModule jit_train_step, is_scheduled=true

%fused_add (p0: f32[8]) -> f32[8] {
  %p0 = f32[8]{0} parameter(0)
  ROOT %add.1 = f32[8]{0} add(%p0, %p0), metadata={op_name="jit(train_step)/jvp(mlp)/add"}
}

%fused_dot (p1: f32[8,8]) -> f32[8,8] {
  %p1 = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%p1, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%fused_copy (p2: f32[8]) -> f32[8] {
  %p2 = f32[8]{0} parameter(0)
  ROOT %copy.9 = f32[8]{0} copy(%p2)
}

ENTRY %main (a: f32[8], b: f32[8,8]) -> f32[8] {
  %a = f32[8]{0} parameter(0), metadata={op_name="state.params[\\'head\\']"}
  %b = f32[8,8]{1,0} parameter(1)
  %loop_add_fusion.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_add
  %gemm_fusion.3 = f32[8,8]{1,0} fusion(%b), kind=kCustom, calls=%fused_dot, metadata={op_name="jit(train_step)/transpose(jvp(head))/dot_general"}
  %cublas.4 = f32[8,8]{1,0} custom-call(%b, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(train_step)/jvp(attention)/btd,dnh->btnh/dot_general"}
  %cudnn.5 = f32[8,8]{1,0} custom-call(%b), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(train_step)/jvp(attention)/dot_product_attention"}
  %pallas.10 = f32[8,8]{1,0} custom-call(%b), custom_call_target="tpu_custom_call", metadata={op_name="jit(train_step)/jvp(attention)/splash_mha_fwd"}
  %triton.11 = f32[8,8]{1,0} custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(train_step)/jvp(jit(layer))/attention/add_norm_forward/pallas_call"}
  %triton.13 = (f32[8]{0}, f32[8,8]{1,0}) custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(train_step)/jvp(head)/while/body/cross_entropy/pallas_call"}
  %triton.14 = f32[8,8]{1,0} custom-call(%b), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(train_step)/transpose(jvp(jit(layer)))/attention/rotary_backward/pallas_call"}
  %mosaic.12 = f32[8,8]{1,0} custom-call(%b, %b), custom_call_target="mosaic_gpu_v2", metadata={op_name="jit(train_step)/transpose(jvp(jit(layer)))/mlp/matmul/mpmd_map"}
  %copy_fusion = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_copy
  %all-gather-start.6 = f32[8]{0} all-gather-start(%a), metadata={op_name="jit(train_step)/optimizer/mul"}
  %while.7 = f32[8]{0} while(%a), condition=%c, body=%d
  ROOT %sort.8 = f32[8]{0} sort(%a), metadata={op_name="jit(train_step)/embedding/sort"}
}
"""  # noqa: E501
KNOWN = [
    ("loop_add_fusion.2", "element-wise fusion", "mlp"),
    ("gemm_fusion.3", "matmul", "head"),
    ("cublas.4", "matmul", "attention"),
    ("cudnn.5", "attention", "attention"),
    ("pallas.10", "attention", "attention"),
    ("triton.11", "element-wise fusion", "attention"),
    ("triton.13", "element-wise fusion", "head"),
    ("triton.14", "element-wise fusion", "attention"),
    ("mosaic.12", "matmul", "mlp"),
    ("copy_fusion", "copy", "other"),
    ("all-gather-start.6", "collective", "optimizer"),
    ("sort.8", "other", "embedding"),
]


@pytest.mark.parametrize(("name", "what", "scope"), KNOWN)
def test_instructions_have_a_class_and_a_scope(name, what, scope):
    module = hlo.parse(HLO)
    each = module.computations["main"].by_name[name]
    assert profile.class_of(each, module) == what
    assert profile.scope_of(each, module) == scope


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "matmul"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "matmul"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("ncclDevKernel_AllGather_RING_LL", "collective"),
        ("MemcpyD2D", "copy"),
        ("loop_multiply_fusion_12", "element-wise fusion"),
        ("RedzoneAllocatorKernel", "other"),
    ],
)
def test_kernels_without_an_instruction_have_the_class_of_their_name(name, what):
    assert profile.class_of_name(name) == what


def trace(plane, line, events):
    """Returns a trace with one line of (name, hlo_op or None, nanoseconds)."""
    kinds, said = [], []
    for i, (name, op, ns) in enumerate(events, 1):
        kinds.append(
            f'event_metadata {{ key: {i} value {{ id: {i} name: "{name}" }} }}'
        )
        stat = f'stats {{ metadata_id: 1 str_value: "{op}" }}' if op else ""
        said.append(
            f"events {{ metadata_id: {i} offset_ps: 0 duration_ps: {ns}000 {stat} }}"
        )
    other = "events { metadata_id: 1 offset_ps: 0 duration_ps: 7000000 }"
    text = (
        f'planes {{ name: "{plane}" lines {{ name: "{line}" {" ".join(said)} }} '
        f'lines {{ name: "Steps" {other} }} {" ".join(kinds)} '
        'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } } '
        f'planes {{ name: "/host:CPU" lines {{ name: "Stream" '
        f"{' '.join(said)} }} {' '.join(kinds)} "
        'stat_metadata { key: 1 value { id: 1 name: "hlo_op" } } }'
    )
    return jax.profiler.ProfileData.from_serialized_xspace(
        jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
    )


def test_a_trace_of_a_gpu_is_read_by_its_streams():
    events = [
        ("nvjet_tst_64", "cublas.4", 300),
        ("loop_add_fusion_2", None, 200),
        ("nccl_all_gather", "all-gather-start.6", 100),
        ("MemcpyD2D", None, 50),
        ("whatever", "while.7", 5000),
    ]
    data = trace("/device:GPU:0", "Stream #7(Compute)", events)
    found = profile.summed(profile.kernels(data), hlo.parse(HLO), 2)
    assert found["by_class"] == pytest.approx(
        {
            "matmul": 150e-9,
            "element-wise fusion": 100e-9,
            "collective": 50e-9,
            "copy": 25e-9,
        }
    )
    assert found["by_scope"]["mlp"] == pytest.approx({"element-wise fusion": 100e-9})
    assert found["devices"] == ["/device:GPU:0"]
    assert found["largest"][0]["name"] == "cublas.4"


def test_a_trace_of_a_tpu_is_read_by_its_operations():
    events = [
        ("%gemm_fusion.3 = f32[8,8] fusion(f32[8,8] %b), calls=%fused_dot", None, 400),
        ("%while.7 = f32[8] while(f32[8] %a)", None, 900),
    ]
    data = trace("/device:TPU:0", "XLA Ops", events)
    found = profile.summed(profile.kernels(data), hlo.parse(HLO), 1)
    assert found["by_scope"] == {"head": {"matmul": pytest.approx(400e-9)}}


def test_a_trace_without_kernels_says_which_planes_it_has(found):
    empty = profile.summed([], hlo.parse(HLO), 3)
    said = {"trace": "x", "planes": ["/host:metadata", "/host:CPU"], **empty}
    words = bench.in_words(found | {"profile": said})
    assert "no kernels of the step; its planes: /host:metadata, /host:CPU" in words


def test_a_folder_that_cannot_be_made_is_refused_before_the_work(tmp_path):
    path = tmp_path / "file"
    path.write_text("")
    request = command.Request(profile=True, workdir=str(path))
    with pytest.raises(CheckpointError, match="--workdir=.*; give a folder"):
        bench.benchmark(RUN, request)


def test_problems_come_together():
    with pytest.raises(ConfigError) as err:
        line.read(
            ["bench", "--config=experiments/quickstart.py", "--steps=0",
             "--workdir=x", "--config.num_steps=0", "--swep"]
        )  # fmt: skip
    said = str(err.value)
    for words in (
        "--steps=0; below 1; give 1 or more.", "--workdir=x; no effect without",
        "num_steps=0; below 1", "did you mean --sweep?",
    ):  # fmt: skip
        assert words in said


def test_a_command_line_becomes_a_request():
    args, run = line.read(
        ["bench", "--config=experiments/quickstart.py", "--data", "--steps=7"]
    )
    assert command.request(args) == command.Request(steps=7, data=True)
    assert run.batch_size == 16
    assert isinstance(args, argparse.Namespace)
