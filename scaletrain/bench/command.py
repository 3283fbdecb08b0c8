"""`scaletrain bench`: the time of a step of `train`, and the speed of the hardware."""

import argparse
import dataclasses
import json
from typing import Any

import jax

from scaletrain import config, mesh, workdir
from scaletrain.bench import measure, profile, roofline
from scaletrain.bench.measure import Timed
from scaletrain.bench.sweep import Sweep
from scaletrain.config import RunConfig
from scaletrain.console import say
from scaletrain.errors import BenchError, ConfigError, does_not_fit
from scaletrain.monitor.meter import Throughput
from scaletrain.program import Program, build


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of a bench that are not settings of the run."""

    steps: int = 20  # number of timed steps
    data: bool = False  # read the data of the settings instead of random tokens
    profile: bool = False  # add a profile by kernel and scope
    sweep: bool = False  # try other settings, then measure the fastest
    workdir: str = ""  # folder of the trace; "" = a temporary one


def request(args: argparse.Namespace) -> Request:
    """Returns the request of a command line."""
    names = [field.name for field in dataclasses.fields(Request)]
    return Request(**{name: getattr(args, name) for name in names})


def benchmark(run: RunConfig, request: Request) -> dict[str, Any]:
    """Returns the record of a run on the present devices, as `--json` prints it.

    With a sweep, the record is that of the fastest settings.

    Raises:
      ConfigError: the devices cannot run these settings.
      CheckpointError: the folder of the trace cannot be made.
      BenchError: a step does not fit into the memory of the devices.
    """
    run = config.resolve(run, jax.device_count())
    if request.sweep and jax.process_count() > 1:
        raise ConfigError(
            [
                f"--sweep; {jax.process_count()} processes would choose by clocks of "
                "their own; sweep in one process."
            ]
        )
    if request.workdir:
        workdir.make_workdir(request.workdir)
    extra: dict[str, Any] = {}
    if request.sweep:
        # Only the fastest settings are profiled.
        untraced = dataclasses.replace(request, profile=False)
        sweep = Sweep(run, jax.device_count(), lambda each: _timed(each, untraced)[1])
        extra["candidates"] = sweep.best()
        if not any(each["fits"] for each in extra["candidates"]):
            raise _too_large(run)
        run = sweep.applied(extra["candidates"][0]["overrides"])
    try:
        program, timed, profiled = _timed(run, request)
    except jax.errors.JaxRuntimeError as err:
        if not does_not_fit(str(err)):
            raise
        raise _too_large(run) from err
    say(f"step {timed.step_time_s:.4f} s; measuring what the hardware can do")
    record = _record(program, timed, roofline.measure(program))
    if request.data:
        record["data_wait"] = timed.data_wait
    return record | profiled | extra


def _timed(run: RunConfig, request: Request) -> tuple[Program, Timed, dict[str, Any]]:
    """Returns the program of a resolved run, its times and the requested profile."""
    devices = mesh.build(run.mesh)
    program = build(run, devices)
    with jax.set_mesh(devices):
        feed = measure.from_data if request.data else measure.synthetic
        steps = measure.Steps(program, run, feed)
        timed = steps.measure(request.steps)
        profiled = {}
        if request.profile:
            profiled = {"profile": profile.of(steps, request.workdir)}
        return steps.program, timed, profiled


def _too_large(run: RunConfig) -> BenchError:
    return BenchError(
        f"batch_size={run.batch_size}; a step does not fit into the memory of a "
        f"{jax.devices()[0].device_kind}; lower it, or see what does: --sweep."
    )


def _record(program: Program, timed: Timed, ceilings: dict[str, Any]) -> dict[str, Any]:
    run, devices = program.run, jax.devices()
    speed = Throughput(run, devices).read(timed.step_time_s)
    return {
        "step_time_s": timed.step_time_s,
        "step_time_spread": timed.spread,
        "tokens_per_s_per_device": speed["tokens_per_s"] / len(devices),
        "mfu": speed["mfu"],
        "mfu_palm": speed["mfu_palm"],
        "peak_flops": speed["peak_flops_per_device"],
        "peak_memory_bytes": timed.peak_memory_bytes,
        "compile_time_s": timed.compile_time_s,
        "roofline": ceilings,
        "achieved_over_ideal": ceilings["ideal"]["step_s"] / timed.step_time_s,
        "device": {
            "kind": devices[0].device_kind,
            "platform": devices[0].platform,
            "count": len(devices),
            "jax": jax.__version__,
        },
        "config": json.loads(config.to_json(run)),
    }
