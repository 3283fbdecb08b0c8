"""`model.remat=auto`: the least recomputation that fits, compiled once."""

import types

import jax
import pytest
import small

from scaletrain import compilation, config, mesh
from scaletrain.errors import ConfigError, does_not_fit
from scaletrain.hardware import slices
from scaletrain.plan import command
from scaletrain.program import build

RUN = config.resolve(small.changed(small.RUN, model__remat="auto"), 1)
NEEDS = (80, 60, 50, 40, 30)  # GB, of the candidates in turn


@pytest.fixture
def devices(monkeypatch):
    """Gives a limit to the devices and a size to each step, which is not compiled."""
    asked = []

    def prepare(limit, refused=0):
        def compiled(program, ready):
            model = program.run.model
            asked.append(model.remat)
            assert [model.remat, model.remat_save] in [
                [each["model.remat"], each["model.remat_save"]]
                for each in compilation.CANDIDATES
            ]
            if len(asked) <= refused:
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room")
            size = NEEDS[len(asked) - 1] * 10**9
            return types.SimpleNamespace(
                memory_analysis=lambda: types.SimpleNamespace(
                    peak_memory_in_bytes=size, host_temp_size_in_bytes=0
                )
            )

        monkeypatch.setattr(compilation, "compiled", compiled)
        monkeypatch.setattr(compilation, "_limit_bytes", lambda mesh: limit)
        return asked

    return prepare


def decide(capsys):
    program = build(RUN, mesh.build(RUN.mesh, jax.devices()[:1]))
    with jax.set_mesh(program.mesh):
        chosen, _ = compilation.decided(program, RUN)
    said = capsys.readouterr().err.splitlines()
    return chosen.run.model, [line for line in said if line.startswith("remat")]


def test_the_first_that_fits_is_taken_and_told(devices, capsys):
    asked = devices(55 * 10**9)
    model, said = decide(capsys)
    assert (model.remat, model.remat_save) == (
        "save", ("residual", "query", "key", "value", "attention")
    )  # fmt: skip
    assert asked == ["none", "save", "save"]
    assert said == [
        "remat: save residual,query,key,value,attention fits in 50.0 of 55.0 GB; "
        "none needs 80.0; save residual,query,key,value,attention,mlp_gate,mlp_up "
        "needs 60.0"
    ]


def test_what_does_not_even_compile_does_not_fit(devices, capsys):
    devices(90 * 10**9, refused=4)
    model, said = decide(capsys)
    assert model.remat == "full"
    assert "none needs more than there is" in said[0]


def test_nothing_fits(devices, capsys):
    devices(10**9)
    with pytest.raises(ConfigError, match="nothing fits into 1.0 GB.*lower batch_size"):
        decide(capsys)


def test_a_cpu_has_no_limit(capsys):
    model, said = decide(capsys)
    assert model.remat == "none"
    assert said == ["remat: none (auto: these devices tell of no limit)"]


def test_every_candidate_is_a_run():
    for each in compilation.CANDIDATES:
        config.check(config.applied(RUN, each))


def test_plan_tries_the_same(monkeypatch):
    sizes = iter((9, 8, 3))
    monkeypatch.setattr(command.compiler, "knows", lambda slice_: False)

    def of(run, slice_, said, overrides, wanted):
        remat = run.model.remat
        return {"remat": remat, "fits": next(sizes) < 5, "overrides": overrides}

    monkeypatch.setattr(command.record, "of", of)
    slice_ = slices.parse("h100:1", 1)
    request = command.Request(slices=(slice_,))
    found, interrupted = command._planned(RUN, slice_, request, {"seed": 1})
    assert not interrupted
    assert found["overrides"] == {"seed": 1, **compilation.CANDIDATES[2]}
    assert found["remat"] == "save"


def test_a_kernels_own_memory_is_not_the_devices():
    # the texts of libtpu and of jaxlib's allocator, each up to its sizes
    refused = (
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in"
    )
    assert does_not_fit(f"{refused} memory space hbm. Used 17.40G of 15.75G hbm.")
    assert does_not_fit("RESOURCE_EXHAUSTED: Out of memory while trying to")
    assert not does_not_fit(f"{refused} memory space vmem. Used 81.41M of 63.94M")


def test_kernels_are_timed_once_the_devices_are_ready(monkeypatch):
    done = []
    lowered = types.SimpleNamespace(compile=lambda **_: done.append("compiled"))

    def lower(*_):
        done.append("lowered")
        return lowered

    monkeypatch.setattr(
        compilation, "jitted", lambda _: types.SimpleNamespace(lower=lower)
    )
    program = build(RUN, mesh.build(RUN.mesh, jax.devices()[:1]))
    compilation.compiled(program, ready=lambda: done.append("ready"))
    assert done == ["lowered", "ready", "compiled"]
