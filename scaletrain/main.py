"""What `scaletrain` on a command line runs: flags, then settings, then a command.

Process-wide state is set here and nowhere else. A command's module is imported once
the request is known to make sense.
"""

import argparse
import json
import logging
import os
import sys
from typing import Any, NoReturn

from absl import logging as absl_logging

from scaletrain import cluster, config, flags
from scaletrain.cluster import signals
from scaletrain.config import RunConfig
from scaletrain.errors import ScaletrainError
from scaletrain.hardware.gpus import MEMORY_FRACTION
from scaletrain.monitor.phase_clock import Phases
from scaletrain.program import build
from scaletrain.workdir import Workdir

_COMPILED_BYTES = 2**31  # in a workdir; beyond it those used least recently go


def main() -> None:
    """Runs the command line and exits with what became of it (see `errors`)."""
    # Orbax warns of choices that are made on purpose here, and prints the traceback
    # of what it then raises.
    absl_logging.set_verbosity(absl_logging.FATAL)
    _leave_out_last_writes()
    # Of a GPU's memory; by default jax leaves a quarter of it unused.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    # Of the host's, for arrays on their way to a checkpoint; by default 64, which is
    # less than eight GPUs hold of a state that fills them.
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(_host_gib()))
    try:
        args, run = flags.read(sys.argv[1:])
        record, words = COMMANDS[args.command](run, args)
        if cluster.lead():  # one result, however many processes
            print(json.dumps(record, indent=2) if args.json else words)
        if args.command == "plan" and record["interrupted"]:
            raise KeyboardInterrupt  # what was known by then is told
        cluster.leave(0)
    except ScaletrainError as err:
        print(f"scaletrain: {err}", file=sys.stderr)
        cluster.leave(err.exit_code)
        sys.exit(err.exit_code)
    except KeyboardInterrupt:
        print("scaletrain: interrupted", file=sys.stderr)
        cluster.leave(130)
        sys.exit(130)


def _host_gib() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**30


def _leave_out_last_writes() -> None:
    """Keeps the writes of a save that has failed from telling of themselves one by one.

    Orbax waits for none of them after the first that fails, of which the save tells.
    """
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    tell = sys.unraisablehook

    def tell_others(of: Any) -> None:
        if str(of.exc_value) != "Event loop is closed":
            tell(of)

    sys.unraisablehook = tell_others


def _train(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    signals.catch()
    phases = Phases()
    with signals.at_once(), phases("start"):
        _join(run, args)
        _keep_compiled(args.workdir)
        from scaletrain import evaluate, train
    found = train.run(run, args.workdir, phases)
    return found, f"step {found['step']}: validation {evaluate.in_words(found)}"


def _supervise(run: RunConfig, args: argparse.Namespace) -> NoReturn:
    del run  # it was checked; the process that is started reads it again
    from scaletrain import supervise

    started = supervise.Supervisor(args.words, args.workdir, args.retries)
    sys.exit(started.until_over())


def _eval(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from scaletrain import evaluate

    if args.tokens:
        found = evaluate.score(
            run, args.workdir, args.step, args.tokens, args.save_logits
        )
        return found, f"step {found['step']}: loss {found['loss']:.6f}"
    found = evaluate.run(run, args.workdir, args.step, args.split)
    return found, f"step {found['step']}: {args.split} {evaluate.in_words(found)}"


def _generate(run: RunConfig, args: argparse.Namespace) -> tuple[list[Any], str]:
    from scaletrain import generate

    sampling = generate.Sampling(
        args.temperature, args.top_k, args.top_p, args.max_new_tokens
    )
    prompts = [*(args.prompt or ()), *(args.prompt_ids or ())] or [""]
    found = generate.run(run, args.workdir, args.step, prompts, sampling, args.seed)
    return found, "\n\n".join(map(generate.in_words, found))


def _plan(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from scaletrain.plan import command, report

    found = command.run(run, command.request(args))
    return found, report.in_words(found)


def _bench(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    _join(run, args)
    from scaletrain import bench

    found = bench.run(run, bench.request(args))
    return found, bench.in_words(found)


def _import(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    del run  # its settings come from what is imported
    from scaletrain import importer

    found = importer.run(args.source, args.workdir, args.overrides)
    return found, importer.in_words(found)


def _export(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from scaletrain import exporter

    found = exporter.run(
        run, args.workdir, args.to, args.step, args.dtype, merge=args.merge
    )
    return found, exporter.in_words(found)


def _config(run: RunConfig, args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import jax

    from scaletrain import mesh, sharding

    run = config.resolve(run, config.mesh_size(run.mesh) or jax.device_count())
    grid = mesh.abstract(run.mesh)
    with jax.sharding.use_abstract_mesh(grid):
        table = sharding.table(build(run, grid).state.params)
    settings = config.to_json(run)
    return json.loads(settings), f"{settings}\n{table}"


COMMANDS = {
    "train": _train,
    "supervise": _supervise,
    "eval": _eval,
    "generate": _generate,
    "config": _config,
    "plan": _plan,
    "bench": _bench,
    "import": _import,
    "export": _export,
}


def _keep_compiled(workdir: str) -> None:
    """Keeps executables in the workdir, so that the next start need not compile.

    JAX_COMPILATION_CACHE_DIR names another folder, JAX_ENABLE_COMPILATION_CACHE=false
    none. An executable is known by its program, compiler, options and devices, with a
    CPU's features; one that cannot be read is compiled again with a warning.
    """
    import jax

    if not jax.config.jax_compilation_cache_dir:
        folder = Workdir.of(workdir).compiled
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_compilation_cache_max_size", _COMPILED_BYTES)


def _join(run: RunConfig, args: argparse.Namespace) -> None:
    """Joins the other processes of the run, if there are any, that want the same."""
    cluster.join(args)
    settings = {f"config.{path}": value for path, _, value in config.leaves(run)}
    cluster.agree({"code": cluster.code_version(), **settings})


if __name__ == "__main__":
    main()
